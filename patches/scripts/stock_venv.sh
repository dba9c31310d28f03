#!/usr/bin/env bash
# Makes the scratch environment in which stock SGLang's TokenizerManager imports on a machine without a GPU.
#
#   patches/scripts/stock_venv.sh [PYTHON]      default: the repository's .venv, else python3
#
# It goes to $STOCK_SGLANG (default: stock-sglang in the folder for temporary files). torch is taken from PYTHON's own
# packages when they have it. What would pull in CUDA packages is installed without its dependencies.
set -euo pipefail

here=$(cd "$(dirname "$0")/../.." && pwd)
python=${1:-$here/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
home=${STOCK_SGLANG:-${TMPDIR:-/tmp}/stock-sglang}

"$python" -m venv "$home/venv"
mkdir -p "$home/wheels"
pip=("$home/venv/bin/python" -m pip install --disable-pip-version-check -q)

# A .pth line and not --system-site-packages: that would show the packages below PYTHON when it is a venv itself.
base=$("$python" -c 'import importlib.util, pathlib; s = importlib.util.find_spec("torch"); print(pathlib.Path(s.origin).parents[1] if s else "")')
if [ -n "$base" ]; then
  site=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$base" > "$site/zz_base.pth"
else
  "${pip[@]}" torch==2.13.0 --index-url "${TORCH_INDEX:?no torch in $python: name an index with CPU builds of it}"
fi

"${pip[@]}" libcst pytest numpy requests psutil tqdm safetensors huggingface_hub packaging pyyaml regex filelock pydantic \
  orjson pybase64 pillow starlette ipython aiohttp fastapi uvloop pyzmq openai partial-json-parser dill einops \
  compressed-tensors msgspec setproctitle interegular sentencepiece python-multipart jsonschema watchfiles \
  soundfile
"${pip[@]}" --no-deps transformers==5.6.0 tokenizers==0.22.2 torchvision==0.28.0 xgrammar==0.2.0 \
  apache-tvm-ffi==0.1.9 llguidance==0.7.30
echo "made $home/venv; now: python patches/scripts/table.py"
