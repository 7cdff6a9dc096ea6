#!/usr/bin/env bash
# vLLM over the nodes of a Slurm job, one task per node, with one expert placement.
#
#   sbatch --nodes 2 examples/hosts/slurm.sh MODEL [PLAN]
#
# PLAN, a plan or a recorded load, is only read on the first node: the others take the placement from there.
#SBATCH --job-name=moe-placement
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --kill-on-bad-exit=1
set -euo pipefail

model=${1:?usage: sbatch slurm.sh MODEL [PLAN]}
placement=(--expert-placement-strategy zigzag)
if [[ $# -gt 1 ]]; then
    placement=(--expert-placement-strategy eplb --expert-placement-file "$2")
fi
# The whole list is read: a pipe closed early would end scontrol, and with pipefail this script, now and then.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

# Every node runs the same command; all but the first have no API server. Should one of them vanish, the others
# stop within a minute, and Slurm ends the step.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    head=$1 model=$2
    shift 2
    [[ $SLURM_NODEID == 0 ]] || set -- --headless "$@"
    exec vllm serve "$model" --tensor-parallel-size $((8 * SLURM_NNODES)) --enable-expert-parallel \
        --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --master-addr "$head" --master-port 29500 "$@"
' serve "$head" "$model" "${placement[@]}" --expert-host-timeout 60
