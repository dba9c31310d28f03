#!/usr/bin/env bash
# Lints what CI itself is made of: workflows (zizmor, and jactionlint: actionlint's checks, as a wheel), scripts
# (shellcheck) and Dockerfiles (hadolint). The code's own linters are `make lint`.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(scripts/ci/tools.sh)
PATH=$bin:$PATH
jactionlint .github/workflows/*.yml scripts/ci/act/*/action.yml
zizmor --no-progress --offline --persona pedantic .github/workflows scripts/ci/act
shellcheck scripts/ci/*.sh scripts/ci/act/*/*.sh .ci/run
hadolint docker/*.Dockerfile
