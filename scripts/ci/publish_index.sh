#!/usr/bin/env bash
# Makes the package index of all releases, from their SHA256SUMS: publish_index.sh OUT. Needs GH_TOKEN, GITHUB_SERVER_URL
# and GITHUB_REPOSITORY.
set -euo pipefail
out=${1:?usage: publish_index.sh OUT}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sources=()
while read -r tag; do
  gh release download "$tag" --pattern SHA256SUMS --output "$work/$tag" || continue # a release of something else
  sources+=("$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/releases/download/${tag//+/%2B}=$work/$tag")
done < <(gh release list --exclude-drafts --limit 1000 --json tagName --jq '.[].tagName')
python3 "$here/make_index.py" "$out" "${sources[@]}"
