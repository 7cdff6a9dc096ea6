"""Start `sglang.Engine` for each case in turn, generate, write what came out.

    python -m tests.integration.sglang.engine_child CASES.json RESULTS.json [forked]

A case is {"name", "engine": {arguments of Engine}, "prompts": [[token id, ...], ...],
"max_new_tokens", "threads": cores per rank, "late_env": {variables set between the launcher's
plugins and its workers}, "actions": [asked of SGLang's weight checker in the end], "vanish": [a
command after which one more answer is asked for, which must fail], "rest": seconds before it is
stopped}. Its result holds per prompt the greedy ``ids``, their ``logprobs``, the
``prompt_logprobs`` and how often a draft was ``verified``, and per action whether it succeeded and
what was said. SGLang ends its caller when one of its processes dies: results are written after each
case. Workers are spawned, as SGLang does it, or forked.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from tests.support.warm_workers import WarmContext

IMPORTED = ["sglang.srt.managers.scheduler"]
"""Modules that the process has imported which workers are forked from.

What a scheduler has imported when it loads plugins, and more than a detokenizer has.
"""


INFO = (
    "ep_num_redundant_experts",
    "ep_dispatch_algorithm",
    "init_expert_location",
    "ep_size",
    "tp_size",
)
"""What tests look at of the server's information."""


def run(case: dict, keep) -> dict:
    """Start, generate, stop.

    Args:
        keep: takes the result so far, before something that may end this process.
    """
    import sglang

    os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = case["threads"]
    if case.get("late_env"):
        from sglang.srt.plugins import load_plugins

        load_plugins()
        os.environ.update(case["late_env"])
    began = time.monotonic()
    engine = sglang.Engine(**case["engine"])
    ready = time.monotonic()

    def generate():
        return engine.generate(
            input_ids=case["prompts"],
            sampling_params={
                "temperature": 0.0,
                "max_new_tokens": case["max_new_tokens"],
                "ignore_eos": True,
            },
            return_logprob=True,
            logprob_start_len=0,
        )

    outputs = case["prompts"] and generate()
    rows = [row_of(output) for output in outputs]
    updates = [
        {
            "answer": update_weights(engine, update),
            "rows": [row_of(output) for output in generate()],
        }
        for update in case.get("updates", ())
    ]
    checks = [check_weights(engine, action) for action in case["actions"]]
    if case.get("vanish"):
        keep({"rows": rows, "checks": checks, "vanished": time.time()})
        subprocess.run(case["vanish"], check=True)
        generate()
        return {
            "rows": rows,
            "checks": checks,
            "error": "a request was answered without the other host",
        }
    info = engine.get_server_info()
    time.sleep(case.get("rest", 0))
    engine.shutdown()
    return {
        "rows": rows,
        "updates": updates,
        "checks": checks,
        "info": {key: info.get(key) for key in INFO},
        "start_s": ready - began,
    }


def row_of(output: dict) -> dict:
    """Return one prompt's part of a result.

    SGLang answers with log probabilities from the first token on.
    """
    meta = output["meta_info"]
    return {
        "ids": [token for _, token, *_ in meta["output_token_logprobs"]],
        "logprobs": [value for value, *_ in meta["output_token_logprobs"]],
        "prompt_logprobs": [value for value, *_ in meta["input_token_logprobs"][1:]],
        "verified": meta.get("spec_verify_ct"),
    }


def update_weights(engine, update: dict) -> tuple[bool, str]:
    """Give the server the weights of another checkpoint; what it answers.

    SGLang ends itself when weights come while it believes that requests run, as it does for a
    moment after the last answer has left it.
    """
    deadline = time.monotonic() + 60
    while not engine.flush_cache().success and time.monotonic() < deadline:
        time.sleep(0.05)
    if update["how"] == "disk":
        return tuple(engine.update_weights_from_disk(update["path"])[:2])
    from safetensors.torch import load_file

    (file,) = Path(update["path"]).glob("*.safetensors")
    named = [
        (update.get("rename", "{}").format(name), tensor)
        for name, tensor in load_file(file).items()
        if update.get("only", "") in name
    ]
    if hasattr(engine, "begin_weight_update"):  # from 0.5.23 on
        engine.begin_weight_update()
    answer = engine.update_weights_from_tensor(named, load_format=update.get("load_format"))
    if hasattr(engine, "end_weight_update"):
        engine.end_weight_update()
    return tuple(answer[:2])


def check_weights(engine, action: str) -> tuple[bool, str]:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    succeeded, message, *_ = engine.loop.run_until_complete(
        engine.tokenizer_manager.check_weights(CheckWeightsReqInput(action=action), None)
    )
    return succeeded, message


def fork_workers() -> None:
    """Have this process's engines fork their workers from now on."""
    warm = WarmContext(IMPORTED)
    from sglang.srt.entrypoints import engine

    engine.mp = SimpleNamespace(**vars(multiprocessing) | {"Process": warm.Process})


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    if "forked" in sys.argv[3:]:
        fork_workers()
    results = {}
    for case in cases:
        print(f"=== case {case['name']}", flush=True)

        def keep(result, name=case["name"]):
            Path(sys.argv[2]).write_text(json.dumps(results | {name: result}))

        try:
            results[case["name"]] = run(case, keep)
        except Exception as error:
            results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
        Path(sys.argv[2]).write_text(json.dumps(results))
        print(f"=== end {case['name']}", flush=True)


if __name__ == "__main__":
    main()
