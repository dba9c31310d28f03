#!/usr/bin/env bash
# What can be said of wheels without installing them: check_wheels.sh dist/*.whl prints size, content and tags.
# With MANYLINUX_POLICY=manylinux_2_28_x86_64 those with compiled code must be of that policy or an older one.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$(scripts/ci/tools.sh)
for wheel; do
  name=${wheel##*/}
  echo "==> $name, $(stat --format=%s "$wheel") bytes"
  case $name in
    sglang-*+lora.*-py3-none-any.whl)
      "$bin/check-wheel-contents" "$wheel"
      ;;
    sgl_kernel-*-py3-none-*manylinux*_x86_64.whl)
      "$bin/check-wheel-contents" "$wheel"
      "$bin/auditwheel" show "$wheel"
      [[ $name == *"${MANYLINUX_POLICY:-}"* ]] || { echo "$name is not of ${MANYLINUX_POLICY}" >&2 && exit 1; }
      ;;
    *) echo "not a wheel of this project, or one that was not repaired: $name" >&2 && exit 1 ;;
  esac
done
