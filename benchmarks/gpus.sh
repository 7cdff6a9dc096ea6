#!/usr/bin/env bash
# Everything that needs GPUs, on one host, into OUT; all steps or some:
#
#   ENGINE=vllm|sglang benchmarks/gpus.sh OUT [STEP...]
#
#   exchange         moving experts: bandwidth and pause, against plain copies and vLLM's own (all GPUs; vLLM)
#   overlap          what chunking hides of the staged layer's exchange (all GPUs)
#   kernels          the staged layer against the reference and the engine's fused call (one GPU)
#   recording        what recording the load costs (one GPU; vLLM)
#   fingerprints     their time (one GPU)
#   serving          all servers, tensor-parallel attention; serving-grouped: a grouped model; serving-dp: data-parallel attention;
#   serving-eager    without CUDA graphs, and whether answers differ where nothing is placed (all GPUs)
#   answers          in float32 (SGLang's kernels take float16 at most), with and without CUDA graphs, tensor-parallel attention; answers-dp:
#                    data-parallel attention: a placement must not change them, nor experts that move (all GPUs)
#
# ENGINE must be installed with this plugin. GPUS: how many to use. PREFILL, DECODE: recorded loads that the routers follow,
# from examples/deepseek-r1 unless given. LIMIT: seconds for each step; what was measured until then stays. LAYERS: of the
# models that are served; with fewer of them more servers fit into the GPUs at once.
# Without a GPU small shapes run on the CPU, which shows that the scripts work, and nothing else.
set -uo pipefail

steps=(exchange overlap kernels recording fingerprints serving serving-grouped serving-dp serving-eager answers answers-dp)
usage="usage: benchmarks/gpus.sh OUT [STEP...], steps: ${steps[*]}"
out=$(mkdir -p "${1:?$usage}" && cd "$1" && pwd) || exit 2
shift
(($#)) || set -- "${steps[@]}"
for name; do
    if [[ " ${steps[*]} " != *" $name "* ]]; then
        echo "unknown step $name; $usage" >&2
        exit 2
    fi
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ENGINE=${ENGINE:-vllm} PYTHON=${PYTHON:-python3} PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
loads=$root/examples/deepseek-r1
export PREFILL=${PREFILL:-$loads/in8k_out1k.safetensors} DECODE=${DECODE:-$loads/in1k_out8k.safetensors}
found=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())") || exit 2
export GPUS=${GPUS:-$((found ? found : 2))}
# The same for all communicators, whether or not there is room left for multicast buffers when they are made.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

serve() { # FILE LOAD MODEL WORKLOAD... [-- ARGUMENT...]
    local file=$out/$1-$ENGINE.json load=$2 model=$3 arguments=()
    # Steps with the same model and load serve the same checkpoint, which takes a minute to write, and record its routing once.
    local folder=$work/$model-$(basename "$2")${LAYERS:+-$LAYERS}
    shift 3
    if [[ -e $folder/load.safetensors ]]; then
        cp "$folder/load.safetensors" "$folder/recorded.safetensors"
        arguments+=(--recorded "$folder/recorded.safetensors")
    fi
    if [[ -n ${LAYERS:-} ]]; then arguments+=(--layers "$LAYERS"); fi
    while (($#)) && [[ $1 != -- ]]; do
        if ((found)); then arguments+=(--workload "$1"); fi
        shift
    done
    if ((found == 0)); then
        model=tiny-grouped arguments+=(--cpu --workload tiny --repeats 1)
    fi
    "$PYTHON" -m moe_placement_plugin.lab.gpu.serving --engine "$ENGINE" --ranks "$GPUS" --load "$load" --model "$model" --folder "$folder" --json "$file" "${arguments[@]}" "${@:2}"
}

step() {
    local few=(--contestant linear --contestant ideal --contestant zigzag --contestant eplb)
    local same=(--contestant linear+recording) # what must answer as stock does
    if ((found)); then few=(--contestant stock "${few[@]}") same+=(--contestant "stock again"); fi
    case $1 in
    exchange)
        for shape in $( ((found)) && echo 5-layer v2-lite r1 || echo tiny); do
            "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m moe_placement_plugin.lab.gpu.exchange --shape "$shape" \
                --json "$out/exchange-$shape.json"
        done
        ;;
    overlap) "$root/benchmarks/staged_moe.sh" "$out" overlap ;;
    kernels) "$root/benchmarks/staged_moe.sh" "$out" check overhead ;;
    recording) "$PYTHON" -m moe_placement_plugin.lab.bench.recording.run --rounds 24 ;;
    fingerprints)
        local size=(--gb 1)
        if ((found)); then size=(--gb 16 --device cuda); fi
        "$PYTHON" -c "from moe_placement_plugin.cli import main; main()" bench verify --json "$out/fingerprints.json" "${size[@]}"
        ;;
    serving) serve serving "$PREFILL" qwen3-30b-a3b prefill decode mixed ;;
    serving-grouped) serve serving-grouped "$PREFILL" v2-lite prefill decode mixed -- "${few[@]}" ;;
    serving-dp) serve serving-dp "$DECODE" qwen3-30b-a3b prefill decode mixed -- --layout dp ;;
    serving-eager) serve serving-eager "$PREFILL" qwen3-30b-a3b prefill -- --eager "${few[@]}" "${same[@]}" ;;
    answers | answers-dp)
        LAYERS=4
        local layout=tp
        if [[ $1 = answers-dp ]]; then layout=dp; fi
        if ((found)); then few+=(--contestant balanced --contestant "our EPLB async"); else few=(--contestant linear); fi
        few+=(--contestant eplb+8 --contestant "our EPLB")
        local dtype=float32
        if ((found)) && [[ $ENGINE = sglang ]]; then dtype=float16; fi
        for graphs in graphs eager; do
            serve $1-$graphs "$PREFILL" qwen3-30b-a3b -- --layout $layout --dtype $dtype --answers-only "${few[@]}" "${same[@]}" \
                $([[ $graphs = eager ]] && echo --eager)
        done
        ;;
    esac
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export -f serve step
export out root work found
failed=()
for name; do
    if ((found == 0)) && [[ $ENGINE = sglang && $name = *-dp ]]; then
        echo "=== $name left out: SGLang's CPU engine has no data-parallel attention"
        continue
    fi
    echo "=== $name, $ENGINE, $GPUS ranks"
    timeout --kill-after 60 "${LIMIT:-3600}" bash -ec "step $name" 2>&1 | tee "$out/$name-$ENGINE.txt"
    if ((PIPESTATUS[0])); then failed+=("$name"); fi
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
