#!/usr/bin/env bash
# Publishes the wheels of a folder as the release of a tag: release.sh dist v0.5.12+lora.1. Needs GH_TOKEN and SHA256SUMS.
# With DRY_RUN=1 it only says what it would do, and the tag may be left out.
set -euo pipefail
dist=${1:?usage: release.sh FOLDER TAG}
version=$(basename "$dist"/sglang-*-py3-none-any.whl | cut -d- -f2)
tag=${2:-${DRY_RUN:+v$version}}
changes=$(dirname "$0")/../../CHANGELOG.md
fail() { echo "$*" >&2 && exit 1; }

[ "$tag" = "v$version" ] || fail "the tag is '$tag', the wheel's version $version"
# A release is complete or is none: kernels for both vendors and for neither.
shopt -s extglob
for kernel in '+([0-9.])+cu+([0-9])' '+([0-9.])+rocm' '+([0-9.])'; do
  compgen -G "$dist/sgl_kernel-$kernel-py3-none-manylinux*.whl" >/dev/null || fail "no sgl_kernel-$kernel in $dist"
done
(cd "$dist" && sha256sum --check --strict SHA256SUMS)
# The changelog's section of this version.
notes=$(awk -v version="$version" '/^## /{on = $2 == version; next} on' "$changes")
[ -n "$notes" ] || fail "CHANGELOG.md has no section $version"
run=(gh release create "$tag" --verify-tag --title "$tag" --notes "$notes" "$dist"/*.whl "$dist/SHA256SUMS")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${run[@]}" && echo
  exit
fi
! grep -Fxq "## $version (unreleased)" "$changes" || fail "CHANGELOG.md says that $version is unreleased"
"${run[@]}"
