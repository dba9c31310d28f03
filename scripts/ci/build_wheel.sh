#!/usr/bin/env bash
# Builds one wheel into dist/, or $DIST: build_wheel.sh sglang|cuda|rocm|cpu, the last three of sgl-kernel. Needs no GPU.
# With MANYLINUX_IMAGE it builds in that container, whose old C library makes the wheel install everywhere; without,
# the wheel wants a C library as new as this machine's, and its name says so.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?usage: build_wheel.sh sglang|cuda|rocm|cpu}
out=${DIST:-dist}
case $target in sglang | cuda | rocm | cpu) ;; *) echo "no such wheel: $target" >&2 && exit 2 ;; esac

if [ -n "${MANYLINUX_IMAGE:-}" ]; then
  # As this user, so that dist/ belongs to it.
  exec docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/src" --workdir /src \
    --env HOME=/tmp --env PYTHON=python3.12 --env MANYLINUX_POLICY --env DIST "$MANYLINUX_IMAGE" \
    scripts/ci/build_wheel.sh "$target"
fi

bin=$(scripts/ci/tools.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Only what git knows goes into a wheel, and no build leaves files here.
mkdir "$work/source"
git -c safe.directory='*' ls-files -z | tar --create --null --files-from=- | tar --extract --directory="$work/source"
SOURCE_DATE_EPOCH=$(git -c safe.directory='*' log -1 --format=%ct) # the same commit, the same bytes
export SOURCE_DATE_EPOCH
pip=("$bin/python" -m pip --disable-pip-version-check)

if [ "$target" = sglang ]; then
  "${pip[@]}" wheel --quiet --no-deps --wheel-dir "$out" "$work/source"
  exit
fi

export SGL_KERNEL_TARGET=$target
if [ "$target" = cuda ] && [ -z "${CUDA_HOME:-}" ]; then
  # nvcc as wheels: the parts that compile, of one release, in one folder. That release is the suffix +cu130.
  "${pip[@]}" install --quiet --no-deps --target "$work/cuda" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
  export CUDA_HOME=$work/cuda/nvidia/cu13
fi
"${pip[@]}" wheel --no-deps --wheel-dir "$work/wheel" "$work/source/sgl-kernel"
# libtvm_ffi.so comes with the package apache-tvm-ffi, which the wheel requires.
PATH=$bin:$PATH auditwheel repair --exclude libtvm_ffi.so ${MANYLINUX_POLICY:+--plat "$MANYLINUX_POLICY"} --wheel-dir "$out" "$work"/wheel/*.whl
