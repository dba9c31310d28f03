#!/usr/bin/env bash
# Writes SHA256SUMS beside the wheels of a folder: checksums.sh dist. The package index is made of these files.
set -euo pipefail
cd "${1:?usage: checksums.sh FOLDER}"
sha256sum -- *.whl | tee SHA256SUMS
