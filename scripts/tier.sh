#!/usr/bin/env bash
# Runs a command in an engine's environment, its lines marked with the tier's name, and notes how
# long it took.
#
#   scripts/tier.sh ENVS ENGINE TIER COMMAND...        seconds go to ENVS/times
set -euo pipefail
environments=$(realpath "$1") engine=$2 tier=$3
shift 3
# Without compiled modules on disk each of an engine's processes compiles all of its imports: 10 s a
# process.
unset PYTHONDONTWRITEBYTECODE
export PATH=$environments/$engine/bin:$PATH NUMBA_CACHE_DIR=$environments/numba-$engine
began=$SECONDS
status=0
"$@" 2>&1 | sed -u "s/^/$tier: /" || status=$?
outcome=$([[ $status == 0 ]] && echo passed || echo failed)
echo "$tier $((SECONDS - began)) s $outcome" | tee -a "$environments/times"
exit "$status"
