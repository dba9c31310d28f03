#!/usr/bin/env bash
# The tests that need a GPU, on a machine that has one: gpu_test.sh cuda|rocm. TORCH says which build of torch, as for
# `make venv`; the report goes to reports/.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?usage: gpu_test.sh cuda|rocm}
make venv TARGET="$target"
# A run that found no GPU would skip everything and look well.
.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no GPU")'
mkdir -p reports
make test JOBS=0 ARGS="-m gpu --junitxml=reports/gpu-$target.xml"
