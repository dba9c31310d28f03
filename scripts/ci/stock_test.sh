#!/usr/bin/env bash
# The patcher against the releases it is for, those of VERSIONS="0.5.9 0.5.12" or all: fetches their wheels (8 MB each),
# drives the TokenizerManager of each on every path before and after the patch, prints the table, and runs the tests that
# need a wheel, a live server among them. TORCH says which build of torch, as for `make venv`. What it fetches and
# measures is kept in $STOCK_SGLANG.
set -euo pipefail
cd "$(dirname "$0")/../.."
export STOCK_SGLANG=${STOCK_SGLANG:-${TMPDIR:-/tmp}/stock-sglang}
make venv
[ -x "$STOCK_SGLANG/venv/bin/python" ] || patches/scripts/stock_venv.sh
# shellcheck disable=SC2086 # a list
.venv/bin/python patches/scripts/table.py ${VERSIONS:+--versions $VERSIONS}
make test ARGS=test/patches
