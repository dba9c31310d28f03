#!/usr/bin/env bash
# Makes python and python3 mean the version asked for in the steps that follow.
set -euo pipefail
found=$(command -v "python$1") || { echo "python$1 is not on PATH" >&2 && exit 1; }
mkdir -p "$RUNNER_TEMP/python$1"
ln -sf "$found" "$RUNNER_TEMP/python$1/python3"
ln -sf "$found" "$RUNNER_TEMP/python$1/python"
echo "$RUNNER_TEMP/python$1" >>"$GITHUB_PATH"
