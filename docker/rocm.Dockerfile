# The server for AMD GPUs. Put wheels into dist/ (scripts/ci/build_wheel.sh sglang, then rocm), and
#   docker build --file docker/rocm.Dockerfile --tag sglang:rocm .
#   docker run --device /dev/kfd --device /dev/dri --group-add video --group-add render --ipc=host \
#     --publish 30000:30000 --volume /path/to/model:/model:ro sglang:rocm --model-path /model
# The base image has ROCm and the torch and Triton that are built for it; any other with torch 2.9 or newer does as well.
ARG BASE=rocm/pytorch:rocm7.2.2_ubuntu24.04_py3.12_pytorch_release_2.10.0
# hadolint ignore=DL3006 # its tag is in BASE
FROM ${BASE}

COPY dist/sglang-*+lora.*-py3-none-any.whl dist/sgl_kernel-*+rocm-py3-none-manylinux*_x86_64.whl /wheels/
# The torch that is there stays, as the package index has none for ROCm: the constraint is what it calls itself.
RUN python3 -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /constraints.txt /wheels/sgl_kernel-*.whl \
    && python3 -m pip install --no-cache-dir --constraint /constraints.txt /wheels/sglang-*.whl

RUN useradd --create-home --uid 10001 --groups video sglang
USER 10001
WORKDIR /home/sglang
EXPOSE 30000
# SIGTERM lets running requests end: python itself is to be the process that gets it.
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--port", "30000"]
CMD ["--help"]
