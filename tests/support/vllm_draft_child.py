"""Run vLLM on two ranks with a draft; print tokens, maps and what was accepted.

    python -m tests.support.vllm_draft_child CASES.json

A case is {"name", "engine": {LLM arguments}}. For each a line ``CASE`` and JSON: {"name", "tokens"
[prompt][token], "accepted" (metric -> value), "maps" [rank]{layer: expert map of the draft}}, or
{"name", "error"}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.support.vllm_runner import CORE_HERE, ENVIRONMENT

PROMPTS = ["hello world", "The quick brown fox", "0123456789 abc"]


def draft_maps(worker) -> dict:
    """Run in every worker: return the expert map of each MoE layer of the draft."""
    from moe_placement_plugin.engines.vllm.layers import routed_layers

    layers = routed_layers(worker.model_runner.drafter.model)
    maps = {name: layer.expert_map_manager.expert_map for name, layer in layers.items()}
    return {name: None if found is None else found.tolist() for name, found in maps.items()}


def answer(engine: dict) -> dict:
    """Return what one engine says."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        disable_log_stats=False,
        **engine,
    )
    sampling = SamplingParams(max_tokens=12, temperature=0)
    tokens = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, sampling)]
    accepted = {
        metric.name: getattr(metric, "value", None)
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }
    maps = llm.collective_rpc(draft_maps)
    llm.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "accepted": accepted, "maps": maps}


def main() -> None:
    """Run all cases in turn; a failed one does not keep the others from running."""
    for case in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = answer(case["engine"])
        except Exception as error:  # noqa: BLE001 - it is the result
            result = {"error": f"{type(error).__name__}: {error}"}
        print("CASE", json.dumps({"name": case["name"]} | result), flush=True)


if __name__ == "__main__":
    os.environ.update({**ENVIRONMENT, **CORE_HERE, "VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    main()
