"""Run one SGLang on two GPUs in a child process, asked for answers between steps.

    python -m tests.gpu.sglang_child CASE.json RESULT.json

A case is {"engine": {Engine's arguments}, "steps": [step, ...]}; a step is "answer", "sleep"
(memory of weights and KV cache released and taken again) or {"disk": a checkpoint}. Every step ends
with answers. The result has per step {"error", "answers", "seconds"}, and after all what SGLang's
weight checker said.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def step_of(engine: Any, step: Any) -> None:
    """Carry out what comes before a step's answers.

    Raises:
        RuntimeError: with SGLang's message when it refuses.
    """
    if step == "answer":
        return
    from tests.integration.sglang.engine_child import update_weights

    if isinstance(step, dict):
        succeeded, message = update_weights(engine, {"how": "disk", "path": step["disk"]})
        if not succeeded:
            raise RuntimeError(message)
        return
    deadline = time.monotonic() + 60
    while not engine.flush_cache().success and time.monotonic() < deadline:
        time.sleep(0.05)
    engine.release_memory_occupation()
    engine.resume_memory_occupation()


def main() -> None:
    """Run the case, and write the result after every step, since an engine can end this process."""
    case, path = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    import sglang

    from tests.integration.sglang.engine_child import check_weights, row_of
    from tests.integration.sglang.engines import PROMPTS

    began = time.monotonic()
    engine = sglang.Engine(
        **{
            "attention_backend": "triton",
            "sampling_backend": "pytorch",
            "grammar_backend": "none",
            "enforce_disable_flashinfer_allreduce_fusion": True,
            # Capturing 58 graphs of prefill and compiling their kernels takes 70 s of each start.
            "disable_cuda_graph": True,
            "disable_prefill_cuda_graph": True,
            "dtype": "bfloat16",
            "tp_size": 2,
            "ep_size": 2,
            "skip_tokenizer_init": True,
            "skip_server_warmup": True,
            "log_level": "info",
            "max_total_tokens": 8192,
            "max_running_requests": 8,
            "mem_fraction_static": 0.2,
        }
        | case["engine"]
    )
    result: dict = {"start_s": time.monotonic() - began, "steps": []}
    sampling = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}

    def answers() -> list[dict]:
        found = engine.generate(
            input_ids=PROMPTS, sampling_params=sampling, return_logprob=True, logprob_start_len=0
        )
        return [row_of(output) for output in found]

    for step in case["steps"]:
        row: dict = {"step": step, "error": None}
        result["steps"].append(row)
        at = time.monotonic()
        try:
            step_of(engine, step)
        except Exception as error:  # noqa: BLE001 - it is the result
            row["error"] = f"{type(error).__name__}: {error}"
        row["seconds"] = round(time.monotonic() - at, 2)
        row["answers"] = answers()
        path.write_text(json.dumps(result))
    if case.get("check"):
        from moe_placement_plugin.engines.sglang.verification import ACTION

        result["check"] = check_weights(engine, ACTION)
        path.write_text(json.dumps(result))
    time.sleep(case.get("rest", 0))
    engine.shutdown()


if __name__ == "__main__":
    main()
