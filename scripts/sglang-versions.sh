#!/usr/bin/env bash
# Runs the SGLang test tier, and recording, on the oldest and the newest supported version, each in
# its own environment in DIR.
#
#   scripts/sglang-versions.sh DIR [VERSION ...]      (default 0.5.16 0.5.23)
set -uo pipefail

dir=${1:?usage: sglang-versions.sh DIR [VERSION ...]}
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
versions=("$@")
((${#versions[@]})) || versions=(0.5.16 0.5.23)
failed=()
for version in "${versions[@]}"; do
    environment=$dir/sglang-$version
    python3 "$root/scripts/environment" sglang "$environment" --engine-version "$version" || {
        failed+=("$version")
        continue
    }
    echo "== SGLang $version =="
    (cd "$root" && "$environment/bin/python" -m pytest -q -rA -W ignore \
        tests/unit/engines/sglang tests/integration/sglang \
        --ignore=tests/integration/sglang/test_accuracy.py) || failed+=("$version")
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
