#!/usr/bin/env bash
# Makes the package index of a folder's wheels, serves it on this machine, and lets pip find each wheel there:
# index_test.sh dist. Needs SHA256SUMS, of checksums.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dist=$(realpath "${1:?usage: index_test.sh FOLDER}")
python=${PYTHON:-python3}
work=$(mktemp -d)
server=""
trap 'kill $server || true; rm -rf "$work"' EXIT
mkdir "$work/files" && cp "$dist"/* "$work/files"
cd "$work"
: >log
# Port 0: any that is free. The server says which.
"$python" -u -m http.server --bind 127.0.0.1 0 >log 2>&1 &
server=$!
until url=$(grep -o 'http://[0-9.:]*' log | head -1) && [ -n "$url" ]; do
  kill -0 "$server"
  sleep 0.1
done
"$python" "$here/make_index.py" index "$url/files=files/SHA256SUMS"
# Nothing but this index: neither this machine's settings nor another place to look.
export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS="" PIP_EXTRA_INDEX_URL=""
for folder in index/*/; do
  name=$(basename "$folder")
  "$python" -m pip --disable-pip-version-check download --quiet --no-deps --index-url "$url/$folder" --dest "got/$name" sglang sgl-kernel
  echo "$name: $(cd "got/$name" && echo *.whl)"
  case $name in
    cpu) ! compgen -G 'got/cpu/sgl_kernel-*+*.whl' ;;
    *) compgen -G "got/$name/sgl_kernel-*+$name-*.whl" >/dev/null ;;
  esac || { echo "pip took another wheel from the index $name" >&2 && exit 1; }
done
