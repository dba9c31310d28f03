#!/usr/bin/env bash
# Runs a workflow on this machine, without containers: run_workflow.sh wheels [more options of act, as --job NAME, or
# --matrix python:3.12, or --var TORCH=none]. A part of the suite on one Python, which has to be on PATH:
#   run_workflow.sh test --matrix python:3.12 --env ARGS=test/unit --env JOBS=1
# It runs in a copy of the tree, uncommitted changes included. The actions it uses are replaced by those in act/, and
# what the jobs hand on to each other, the wheels for example, is left in $ACT_ARTIFACTS.
set -euo pipefail
cd "$(dirname "$0")/../.."
workflow=.github/workflows/${1:?usage: run_workflow.sh test|patches|lint|wheels|nightly [options of act]}.yml
shift
for option; do # without containers act runs the steps all the same, and takes the wrong Python
  case $option in -n | --dryrun) echo "act's --dryrun is not one here" >&2 && exit 2 ;; esac
done
bin=$(scripts/ci/tools.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# act reads the commit and the branch from a repository; this one is the copy's own.
mkdir "$work/tree"
git ls-files --cached --others --exclude-standard --deduplicate -z |
  tar --create --null --files-from=- | tar --extract --directory="$work/tree"
# One job of a matrix after the other; --concurrent-jobs is not for those.
sed --in-place 's/^\( *\)strategy:$/&\n\1  max-parallel: 1/' "$work/tree/$workflow"
git -C "$work/tree" init --quiet --initial-branch=main
git -C "$work/tree" add --all
git -C "$work/tree" -c user.name=ci -c user.email=ci@localhost commit --quiet --message "A copy to run workflows in"

replaced=()
while read -r action; do
  name=${action#actions/}
  [ -d "scripts/ci/act/${name%@*}" ] && replaced+=(--local-repository "$action=$PWD/scripts/ci/act/${name%@*}")
done < <(grep -oh 'actions/[a-z-]*@[0-9a-f]*' "$workflow" | sort -u)

ACT_ARTIFACTS=${ACT_ARTIFACTS:-$work/artifacts}
export XDG_CACHE_HOME=$work/cache # where act works; inside the tree it would copy itself
tools=$(dirname "$(dirname "$bin")") # as it is: the jobs need not install it again
"$bin/act" "${ACT_EVENT:-push}" --directory "$work/tree" --workflows "$workflow" --platform ubuntu-24.04=-self-hosted \
  --concurrent-jobs 1 --action-offline-mode "${replaced[@]}" --env MANYLINUX_IMAGE= --env MANYLINUX_POLICY= \
  --env PIP_PROGRESS_BAR=off --env "ACT_ARTIFACTS=$ACT_ARTIFACTS" --env "CI_TOOLS=$tools" "$@"
