#!/usr/bin/env bash
# Makes python and python3 mean the version asked for in the steps that follow.
set -euo pipefail
# Asked itself, since what PATH has may be a stand-in that chooses by its name.
found=$("python$1" -c 'import sys; print(sys.executable)') || { echo "no python$1 on PATH that runs" >&2 && exit 1; }
mkdir -p "$RUNNER_TEMP/python$1"
ln -sf "$found" "$RUNNER_TEMP/python$1/python3"
ln -sf "$found" "$RUNNER_TEMP/python$1/python"
echo "$RUNNER_TEMP/python$1" >>"$GITHUB_PATH"
