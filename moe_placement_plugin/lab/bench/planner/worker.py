"""Runs one planner in its own process: ``python worker.py NAME``, one JSON request per line on stdin, one answer per line on
stdout.

Engines pin libraries that exclude each other, so each runs under the interpreter that it is installed in. The file imports nothing of
this package
unless the planner asked for is this package's own: it is started by its path.

A request names an .npz file with ``load`` (int64 [layers, experts]) and optionally ``old`` (int64 [layers, slots]), the file to write
``table`` (int64 [layers, slots]) to, and ``slots``, ``ranks``, ``groups``, ``nodes``, ``repeats``. The answer holds ``seconds``: the
wall time of
each repeat, of the planner's own entry point, on arguments that it takes as they are. The request ``{"again": true}`` times the last
case once more.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def vllm_policy():
    import torch
    import vllm
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    def prepare(load, old, r):
        weight = torch.from_numpy(load)
        before = None if old is None else torch.from_numpy(old)
        return lambda: DefaultEplbPolicy.rebalance_experts(
            weight, r["slots"], r["groups"], r["nodes"], r["ranks"], before
        )

    return (
        prepare,
        lambda found: found.numpy(),
        {"vllm": vllm.__version__, "torch": torch.__version__},
    )


def sglang_algorithm(name):
    from importlib.metadata import version

    import torch
    from sglang.srt.eplb import eplb_algorithms

    def prepare(load, old, r):
        tokens = torch.from_numpy(load)[None]
        kind = eplb_algorithms.EplbAlgorithm[name + ("_hierarchical" if r["nodes"] > 1 else "")]
        local = r["slots"] // r["ranks"]
        return lambda: eplb_algorithms.rebalance_experts(
            tokens, r["slots"], local, r["groups"], r["nodes"], kind
        )

    return (
        prepare,
        lambda found: found[0].numpy(),
        {"sglang": version("sglang"), "torch": torch.__version__},
    )


def reference():
    from moe_placement_plugin.lab.bench.planner.reference import rebalance  # lazy: heavy

    def prepare(load, old, r):
        return lambda: rebalance(load, r["slots"], r["groups"], r["nodes"], r["ranks"])

    return prepare, lambda found: found, {}


def own(mode):
    import numba
    import numpy as np

    from moe_placement_plugin.planner import plan, replan  # lazy: numba

    def prepare(load, old, r):
        slots = np.full(r["ranks"], r["slots"] // r["ranks"])
        if mode == "replan":
            return lambda: replan(load, old, slots)
        where = {}
        if r["nodes"] > 1:
            where = {
                "node_of_rank": np.arange(r["ranks"]) * r["nodes"] // r["ranks"],
                "num_groups": r["groups"],
                "locality": "node",
            }
        return lambda: plan(load, slots, mode=mode, **where)

    return prepare, lambda found: found.physical_to_logical, {"numba": numba.__version__}


PLANNERS = {
    "vLLM default": vllm_policy,
    "SGLang deepseek": lambda: sglang_algorithm("deepseek"),
    "SGLang deepseek_vec": lambda: sglang_algorithm("deepseek_vec"),
    "DeepSeek reference": reference,
    "fast": lambda: own("fast"),
    "best": lambda: own("best"),
    "thorough": lambda: own("thorough"),
    "replan": lambda: own("replan"),
}


def timed(call):
    """(wall seconds, CPU seconds of all threads, result) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def main() -> None:
    # Whatever libraries print goes to stderr: stdout carries the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np

    try:
        prepare, as_table, versions = PLANNERS[sys.argv[1]]()
    except ImportError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    versions["python"] = sys.version.split()[0]
    versions["numpy"] = np.__version__
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    call: Callable[[], Any] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.get("again"):
                assert call is not None, "there is a case before it is asked for again"
                call()  # the other planners have had the caches meanwhile: times are those of a warm loop
                wall, cpu, _ = timed(call)
                print(
                    json.dumps({"seconds": [wall], "cpu_seconds": [cpu]}), file=answers, flush=True
                )
                continue
            with np.load(request["load"]) as data:
                load = np.ascontiguousarray(data["load"])
                old = np.ascontiguousarray(data["old"]) if "old" in data else None
            call = prepare(load, old, request)
            found = call()  # compiles, fills caches
            seconds, cpu_seconds = [], []
            for _ in range(request["repeats"]):
                wall, cpu, found = timed(call)
                seconds.append(wall)
                cpu_seconds.append(cpu)
            np.save(request["table"], np.asarray(as_table(found), dtype=np.int64))
            print(
                json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}),
                file=answers,
                flush=True,
            )
        except Exception as error:  # a planner that cannot do a case is part of the result
            print(
                json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True
            )


if __name__ == "__main__":
    main()
