# The server for NVIDIA GPUs. Put wheels into dist/ (scripts/ci/build_wheel.sh sglang, then cuda), and
#   docker build --file docker/cuda.Dockerfile --tag sglang:cuda .
#   docker run --gpus all --ipc=host --publish 30000:30000 --volume /path/to/model:/model:ro sglang:cuda --model-path /model
# torch brings CUDA's libraries and the machine brings the driver, 580 or newer for a +cu130 wheel: no CUDA image is needed.
FROM python:3.12-slim-bookworm

# Triton compiles its launchers, and the server its CPU kernels, when they are first used.
# hadolint ignore=DL3008 # the distribution's security updates are wanted
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ARG TORCH=2.13.0
RUN pip install --no-cache-dir "torch==$TORCH"

COPY dist/sglang-*+lora.*-py3-none-any.whl dist/sgl_kernel-*+cu130-py3-none-manylinux*_x86_64.whl /wheels/
# The torch that is there stays: the constraint is what it calls itself.
RUN python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >/constraints.txt \
    && pip install --no-cache-dir --constraint /constraints.txt /wheels/sgl_kernel-*.whl \
    && pip install --no-cache-dir --constraint /constraints.txt "sglang[cuda] @ file://$(echo /wheels/sglang-*.whl)" \
    && pip check

RUN useradd --create-home --uid 10001 sglang
USER 10001
WORKDIR /home/sglang
EXPOSE 30000
# SIGTERM lets running requests end: python itself is to be the process that gets it.
ENTRYPOINT ["python", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--port", "30000"]
CMD ["--help"]
