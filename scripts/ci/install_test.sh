#!/usr/bin/env bash
# Installs wheels as a user would and takes them off again: install_test.sh dist/*.whl, with PYTHON=python3.12 for one
# version. Each wheel of sgl-kernel gets an environment without torch. The wheel of sglang gets one with $TORCH,
# upstream's sglang already in it, and the kernels' cpu wheel. TORCH=none leaves torch out there too: --help and all
# else that comes before a model does without it. STOCK= leaves upstream's wheel out.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
torch=${TORCH-torch==2.13.0}
stock=${STOCK-sglang==0.5.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "FAILED: $*" >&2 && exit 1; }

# An empty environment in $work/env, made again; `pip` is its pip.
fresh() {
  "$python" -m venv --clear "$work/env"
  site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
}
pip() { "$work/env/bin/python" -m pip --disable-pip-version-check "$@"; }
files() { (cd "$work/env" && find . -not -name '__pycache__' -not -path '*/__pycache__/*' | sort); }
ours() { (cd "$site" && find . -ipath './*sgl*' \( -path './sgl*' -o -path './__editable__*' \)); }

# Takes a distribution off: nothing of it may stay, no bytecode and no script.
remove() {
  pip uninstall --quiet --yes "$@"
  [ -z "$(ours)" ] || fail "left behind: $(ours)"
  files | diff "$work/before" - || fail "files came or went with $* (above)"
  echo "uninstalled, nothing left: $*"
}

kernels=() server=()
for wheel; do
  wheel=$(realpath "$wheel")
  case ${wheel##*/} in
    sgl_kernel-*) kernels+=("$wheel") ;;
    sglang-*) server+=("$wheel") ;;
    *) fail "whose is $wheel?" ;;
  esac
done
cd "$work" # no sources beside it

for wheel in "${kernels[@]}"; do
  echo "==> ${wheel##*/} on $("$python" --version), without torch"
  fresh
  pip install --quiet 'apache-tvm-ffi>=0.1.9,<0.2' 'numpy>=1.26' # so that only the wheel's own files go away again
  files >"$work/before"
  pip install --quiet "$wheel"
  pip check
  "$work/env/bin/python" -W error::SyntaxWarning "$here/check_kernel.py"
  remove sgl-kernel
done

for wheel in "${server[@]}"; do
  echo "==> ${wheel##*/} on $("$python" --version), torch: $torch"
  cpu=""
  for kernel in "${kernels[@]}"; do [[ ${kernel##*/} == *+* ]] || cpu=$kernel; done
  [ -n "$cpu" ] || fail "sglang needs a wheel of sgl-kernel, and none without GPU code was given"
  fresh
  # What the wheel requires, without itself and the kernels, which no index has.
  "$python" "$here/requirements_of.py" "$wheel" | grep -Ev '^(sgl-kernel|torch)\b' >"$work/required"
  # shellcheck disable=SC2086 # may carry options of pip
  [ "$torch" = none ] || pip install --quiet $torch
  pip install --quiet --requirement "$work/required" 'apache-tvm-ffi>=0.1.9,<0.2'
  files >"$work/before"
  version=$(cut -d- -f2 <<<"${wheel##*/}")

  if [ -n "$stock" ]; then
    # Without what it requires: gigabytes, none of which the change from one to the other is about.
    pip install --quiet --no-deps "$stock"
    echo "upstream's: $(ours | wc -l) files and folders"
  fi
  # Alone, and then a look at whether all that they require is there: pip itself would fetch a torch that was left out.
  pip install --quiet --no-deps "$wheel" "$cpu"
  [ "$torch" = none ] || pip check
  "$work/env/bin/python" "$here/check_server.py" "$version"
  "$work/env/bin/sglang" version
  "$work/env/bin/python" -m sglang.launch_server --help >help
  grep -q -- --enable-lora help || fail "--help does not know --enable-lora"
  echo "python -m sglang.launch_server --help: $(wc -l <help) lines"
  remove sglang sgl-kernel
done
