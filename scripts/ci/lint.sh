#!/usr/bin/env bash
# Lints what CI itself is made of: workflows (zizmor, and jactionlint: actionlint's checks, as a wheel), the settings of
# dependabot (their schema), scripts (shellcheck) and Dockerfiles (hadolint). The code's own linters are `make lint`.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(scripts/ci/tools.sh)
PATH=$bin:$PATH
jactionlint .github/workflows/*.yml scripts/ci/act/*/action.yml
zizmor --no-progress --offline --persona pedantic .github scripts/ci/act
check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
shellcheck scripts/ci/*.sh scripts/ci/act/*/*.sh patches/scripts/*.sh .ci/run
hadolint docker/*.Dockerfile
