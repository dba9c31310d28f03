#!/usr/bin/env bash
# Copies the files of an artifact to $ACT_ARTIFACTS: upload.sh NAME PATTERN.
set -euo pipefail
mkdir -p "${ACT_ARTIFACTS:?}/$1"
# shellcheck disable=SC2086 # a pattern
cp --recursive $2 "$ACT_ARTIFACTS/$1/"
