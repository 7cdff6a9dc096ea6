"""Child process: one vLLM on two GPUs, asked for answers between the steps of a case.

    python -m tests.gpu.vllm_child CASE.json RESULT.json

A case is {"engine": {LLM arguments}, "steps": [step, ...]}; a step is "answer", "sleep 1", "sleep 2"
(and the weights read anew), "sabotage" (experts at their neighbours' weights), or {"reload":
arguments of reload_weights}. Every step ends with answers. An update that is refused since EPLB moves
experts in the background is tried again after some more answers, as the message says. The result has
per step {"error", "answers", "digests", "retries", "seconds"}, and what the draft did.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RETRIES = 20
BEHIND = "in the background"
"""Part of the message that refuses an update while experts move."""


def describe(worker: Any) -> dict:
    """Runs in every worker: maps of the model's and the draft's MoE layers, and the kernel of the first."""
    from moe_placement_plugin.engines.vllm.layers import routed_layers

    runner = worker.model_runner
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    found = {}
    for name, model in (("model", runner.model), ("draft", getattr(drafter, "model", None))):
        layers = routed_layers(model) if hasattr(model, "modules") else {}
        maps = {key: layer.expert_map_manager.expert_map for key, layer in layers.items()}
        found[name] = {key: m.tolist() for key, m in maps.items() if m is not None}
        if layers and name == "model":
            method = next(iter(layers.values())).quant_method
            kernel = getattr(method, "moe_kernel", None) or getattr(method, "kernel", None)
            found["kernel"] = f"{type(method).__name__}/{type(kernel).__name__}"
    return found


def step_of(llm: Any, step: Any) -> None:
    """Carry out what comes before a step's answers."""
    if step == "answer":
        return
    if isinstance(step, dict):
        llm.collective_rpc("reload_weights", kwargs=step["reload"])
        return
    if step == "sabotage":
        from tests.support.vllm_probes import sabotage

        llm.collective_rpc(sabotage)
        return
    level = int(step.split()[1])
    llm.sleep(level=level)
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def main() -> None:
    """Run the case; the result is written after every step, since an engine can end this process."""
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    case, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import moe_placement_plugin

    moe_placement_plugin.enable()
    from vllm import LLM

    from tests.support.vllm_probes import slot_digests
    from tests.support.vllm_runner import PROMPTS, generate

    began = time.monotonic()
    llm = LLM(
        max_model_len=512, max_num_batched_tokens=512, max_num_seqs=8, tensor_parallel_size=2,
        enable_expert_parallel=True, enable_prefix_caching=False, disable_log_stats=False,
        kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.2, **{"enforce_eager": True, "dtype": "float32"} | case["engine"],
    )  # fmt: skip
    result: dict = {"start_s": time.monotonic() - began, "steps": []}
    result["workers"] = llm.collective_rpc(describe)

    def answers() -> list[dict]:
        return generate(llm, PROMPTS)

    for step in case["steps"]:
        row: dict = {"step": step, "error": None, "retries": 0}
        result["steps"].append(row)
        at = time.monotonic()
        for _ in range(RETRIES):
            try:
                step_of(llm, step)
                row["error"] = None
                break
            except Exception as error:  # noqa: BLE001 - it is the result
                row["error"] = f"{type(error).__name__}: {error}"
                if BEHIND not in row["error"]:
                    break
                row["retries"] += 1
                answers()
        row["seconds"] = round(time.monotonic() - at, 2)
        try:
            row["answers"] = answers()
            row["digests"] = llm.collective_rpc(slot_digests)
        except Exception as error:  # noqa: BLE001 - it is the result
            row["ended"] = f"{type(error).__name__}: {error}"
            path.write_text(json.dumps(result))
            break
        path.write_text(json.dumps(result))
    result["draft"] = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name and hasattr(metric, "value")
    }
    path.write_text(json.dumps(result))
    time.sleep(case.get("rest", 0))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
