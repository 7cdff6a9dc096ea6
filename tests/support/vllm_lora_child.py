"""Run vLLM on two ranks with an adapter of experts; print what lies in each slot.

It is a child process with a placement.

    python -m tests.support.vllm_lora_child CHECKPOINT ADAPTER ENGINE_ARGUMENTS_AS_JSON

The last lines say what came of it: ``SLOTS`` and JSON, [rank][layer] -> {"map", "w2 a", "w3 b"}, or
``REFUSED`` and the message.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.support.vllm_runner import CORE_HERE, ENVIRONMENT

RANK, LAYERS, EXPERTS, WIDTH = 4, 4, 30, 64
PROJECTIONS = ("gate_proj", "down_proj", "up_proj")


def value(layer: int, expert: int, projection: str, side: str) -> float:
    """Return every element of one matrix of the adapter.

    Each matrix has other ones, exact in float32.
    """
    number = PROJECTIONS.index(projection) + 3 * (expert + EXPERTS * layer)
    return (1 + "AB".index(side) + 2 * number) / 1024


def write_adapter(path: Path) -> Path:
    """Write an adapter with a pair of matrices for each expert of the tiny Qwen3-MoE."""
    import torch
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    prefix = "base_model.model.model.layers.{}.mlp.experts.{}.{}.lora_{}.weight"
    save_file(
        {
            prefix.format(layer, expert, projection, side): torch.full(
                (RANK, WIDTH) if side == "A" else (WIDTH, RANK),
                value(layer, expert, projection, side),
            )
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            for projection in PROJECTIONS
            for side in "AB"
        },
        path / "adapter_model.safetensors",
    )
    config = {
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
        "peft_type": "LORA",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def look(worker) -> list[dict]:
    """Run in every worker: return map and adapter of each MoE layer."""
    found = []
    for module in worker.model_runner.model.modules():
        if type(module).__name__ == "FusedMoEWithLoRA":
            manager = module.base_layer.routed_experts.expert_map_manager
            found.append(
                {
                    "map": manager.expert_map.tolist(),
                    "w2 a": module.w2_lora_a_stacked[0][0, :, 0, 0].tolist(),
                    "w3 b": module.w13_lora_b_stacked[1][0, :, 0, 0].tolist(),
                }
            )
    return found


def main() -> None:
    """Run one engine, and end the process at once.

    Workers of an engine that refused wait for each other.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    checkpoint, adapter, more = sys.argv[1:]
    llm = LLM(
        model=checkpoint,
        enable_lora=True,
        max_lora_rank=8,
        enforce_eager=True,
        dtype="float32",
        max_model_len=128,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        **json.loads(more),
    )
    try:
        llm.llm_engine.add_lora(LoRARequest("mine", 1, adapter))
        print("SLOTS", json.dumps(llm.collective_rpc(look)), flush=True)
    except RuntimeError as error:
        print("REFUSED", error, flush=True)
    os._exit(0)  # the caller ends the workers, which are of this process's group


if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **CORE_HERE, "VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    main()
