#!/usr/bin/env bash
# All measurements of the staged layer on a GPU host, into OUT, one section or all:
#
#   benchmarks/staged_moe.sh OUT [check] [overhead] [overlap] [layer]
#
# overlap needs two GPUs, the others one. layer measures DeepSeek-R1 under recorded loads (PREFILL, DECODE, HELD_OUT;
# examples/deepseek-r1 has the defaults), the other shapes under a synthetic one. Sections are independent: each fits into
# ten minutes on an H100. Without a GPU check, overhead and overlap run a tiny shape, GPUS=2 as many processes, and say
# nothing about time.
set -euo pipefail

out=$(mkdir -p "${1:?usage: staged_moe.sh OUT [check] [overhead] [overlap] [layer]}" && cd "$1" && pwd)
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
loads=$root/examples/deepseek-r1
prefill=${PREFILL:-$loads/in8k_out1k.safetensors}
decode=${DECODE:-$loads/in1k_out8k.safetensors}
held_out=${HELD_OUT:-$loads/in1k_out1k.safetensors}
python=${PYTHON:-python3}
cuda=$("$python" -c "import torch; print(torch.cuda.device_count())")
gpus=${GPUS:-$cuda}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
staged() { "$python" -m moe_placement_plugin.lab.gpu.staged_layer "$@"; }
ranks() { "$python" -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m moe_placement_plugin.lab.gpu.staged_layer "$@"; }
layer() { "$python" -c "from moe_placement_plugin.cli import main; main()" bench layer "$@"; }

(($#)) || set -- check overhead overlap layer
for section; do
    {
        case $section in
        check)
            staged check --json "$out/check-1.json"
            if ((gpus > 1)); then ranks check --json "$out/check-$gpus.json"; fi
            ;;
        overhead)
            for shape in $( ((cuda)) && echo v2-lite qwen3-30b-a3b qwen3-235b-a22b gpt-oss-20b || echo tiny); do
                staged overhead --shape "$shape" --json "$out/overhead-$shape.json"
            done
            if ((cuda)); then staged overhead --shape r1 --ep 8 --json "$out/overhead-r1-ep8.json"; fi
            ;;
        overlap)
            for shape in $( ((cuda)) && echo qwen3-30b-a3b qwen3-235b-a22b v2-lite || echo tiny); do
                ranks overlap --shape "$shape" --json "$out/overlap-$shape.json"
            done
            ;;
        layer)
            layer --calibrations "$out" --shape r1 --load "$prefill" --decode 0 --strategy linear --strategy balanced --strategy zigzag --strategy eplb \
                --strategy eplb+32 --json "$out/layer-r1-prefill.json"
            layer --calibrations "$out" --shape r1 --load "$decode" --prefill 0 --strategy linear --strategy balanced \
                --strategy zigzag --strategy eplb --strategy eplb+32 --json "$out/layer-r1-decode.json"
            # Planned on one workload, served on another.
            layer --shape r1 --load "$held_out" --plan-on "$prefill" --ep 32 --decode 0 --strategy linear \
                --strategy zigzag --strategy eplb --strategy eplb+32 --json "$out/layer-r1-held-out.json"
            layer --calibrations "$out" --shape v2-lite --ep 2 --ep 8 --ep 32 --json "$out/layer-v2-lite.json"
            for shape in qwen3-30b-a3b qwen3-235b-a22b gpt-oss-120b; do
                layer --calibrations "$out" --shape $shape --ep 4 --ep 16 --ep 64 --layers 2 --json "$out/layer-$shape.json"
            done
            ;;
        *)
            echo "unknown section: $section" >&2
            exit 2
            ;;
        esac
    } 2>&1 | tee "$out/$section.txt"
done
