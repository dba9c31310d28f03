#!/usr/bin/env bash
# Installs the tools of requirements.txt, once for every version of that file, and prints the folder of their commands.
set -euo pipefail
list=$(dirname "$0")/requirements.txt
venv=${CI_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/sglang-ci}/$(sha256sum <"$list" | cut -c1-12)
if [ ! -e "$venv/installed" ]; then
  "${PYTHON:-python3}" -m venv --clear "$venv" >&2
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet --requirement "$list" >&2
  touch "$venv/installed"
fi
echo "$venv/bin"
