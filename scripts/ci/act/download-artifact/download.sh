#!/usr/bin/env bash
# Copies the files of artifacts from $ACT_ARTIFACTS: download.sh PATTERN FOLDER.
set -euo pipefail
mkdir -p "$2"
# shellcheck disable=SC2086 # a pattern
cp --recursive "${ACT_ARTIFACTS:?}"/$1/* "$2/"
