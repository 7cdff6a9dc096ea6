"""Run one planner in its own process: ``python worker.py NAME``.

One JSON request per line on stdin, one answer per line on stdout. Engines pin libraries that
exclude each other, so each runs under the interpreter that it is installed in. The file imports
nothing of this package unless the planner asked for is this package's own: it is started by its
path.

A request names an .npz file with ``load`` (int64 [layers, experts]) and optionally ``old`` (int64
[layers, slots]), the file to write ``table`` (int64 [layers, slots]) to, and ``slots``, ``ranks``,
``groups``, ``nodes``, ``repeats``. The answer holds ``seconds``: the wall time of each repeat, of
the planner's own entry point, on arguments that it takes as they are, and ``cpu_seconds``. The
request ``{"again": true}`` times the last case once more.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

Request = dict[str, Any]
Case = Callable[[], Any]
"""A call of a planner's entry point."""


class Planner(NamedTuple):
    """Hold one planner.

    Attributes:
        prepare: makes a case of (load, old placement or None, request).
        as_table: gives int [layers, slots] from what the entry point returned.
        versions: what it runs on.
    """

    prepare: Callable[[Any, Any, Request], Case]
    as_table: Callable[[Any], Any]
    versions: dict[str, str]


def vllm_policy() -> Planner:
    """Import vLLM's default EPLB policy."""
    import torch
    import vllm
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    def prepare(load: Any, old: Any, r: Request) -> Case:
        weight = torch.from_numpy(load)
        before = None if old is None else torch.from_numpy(old)
        return lambda: DefaultEplbPolicy.rebalance_experts(
            weight, r["slots"], r["groups"], r["nodes"], r["ranks"], before
        )

    versions = {"vllm": vllm.__version__, "torch": torch.__version__}
    return Planner(prepare, lambda found: found.numpy(), versions)


def sglang_algorithm(name: str) -> Planner:
    """Import one of SGLang's EPLB algorithms."""
    from importlib.metadata import version

    import torch
    from sglang.srt.eplb import eplb_algorithms

    def prepare(load: Any, old: Any, r: Request) -> Case:
        tokens = torch.from_numpy(load)[None]
        kind = eplb_algorithms.EplbAlgorithm[name + ("_hierarchical" if r["nodes"] > 1 else "")]
        local = r["slots"] // r["ranks"]
        return lambda: eplb_algorithms.rebalance_experts(
            tokens, r["slots"], local, r["groups"], r["nodes"], kind
        )

    versions = {"sglang": version("sglang"), "torch": torch.__version__}
    return Planner(prepare, lambda found: found[0].numpy(), versions)


def reference() -> Planner:
    """Import DeepSeek's algorithm as it is written here."""
    from moe_placement_plugin.lab.bench.planner.reference import rebalance  # lazy: heavy

    def prepare(load: Any, old: Any, r: Request) -> Case:
        return lambda: rebalance(load, r["slots"], r["groups"], r["nodes"], r["ranks"])

    return Planner(prepare, lambda found: found, {})


def own(mode: str) -> Planner:
    """Import this package's planner: `replan`, or `plan` with a mode."""
    import numba
    import numpy as np

    from moe_placement_plugin.planner import plan, replan  # lazy: numba

    def prepare(load: Any, old: Any, r: Request) -> Case:
        slots = np.full(r["ranks"], r["slots"] // r["ranks"])
        if mode == "replan":
            return lambda: replan(load, old, slots)
        where: dict[str, Any] = {}
        if r["nodes"] > 1:
            where = {
                "node_of_rank": np.arange(r["ranks"]) * r["nodes"] // r["ranks"],
                "num_groups": r["groups"],
                "locality": "node",
            }
        return lambda: plan(load, slots, mode=mode, **where)

    return Planner(prepare, lambda found: found.physical_to_logical, {"numba": numba.__version__})


PLANNERS: dict[str, Callable[[], Planner]] = {
    "vLLM default": vllm_policy,
    "SGLang deepseek": lambda: sglang_algorithm("deepseek"),
    "SGLang deepseek_vec": lambda: sglang_algorithm("deepseek_vec"),
    "DeepSeek reference": reference,
    "fast": lambda: own("fast"),
    "best": lambda: own("best"),
    "thorough": lambda: own("thorough"),
    "replan": lambda: own("replan"),
}


def timed(case: Case) -> tuple[float, float, Any]:
    """Return (wall seconds, CPU seconds of all threads, result) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = case()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def plan_case(planner: Planner, request: Request) -> tuple[Case, dict[str, Any]]:
    """Plan and time what a request names, and write the table; return the case and the answer."""
    import numpy as np

    with np.load(request["load"]) as data:
        load = np.ascontiguousarray(data["load"])
        old = np.ascontiguousarray(data["old"]) if "old" in data else None
    case = planner.prepare(load, old, request)
    found = case()  # compiles, fills caches
    seconds, cpu_seconds = [], []
    for _ in range(request["repeats"]):
        wall, cpu, found = timed(case)
        seconds.append(wall)
        cpu_seconds.append(cpu)
    np.save(request["table"], np.asarray(planner.as_table(found), dtype=np.int64))
    return case, {"seconds": seconds, "cpu_seconds": cpu_seconds}


def time_again(case: Case | None) -> dict[str, Any]:
    """Time a case once more; return the answer."""
    assert case is not None, "there is a case before it is asked for again"
    # The other planners have had the caches meanwhile: times are those of a warm loop.
    case()
    wall, cpu, _ = timed(case)
    return {"seconds": [wall], "cpu_seconds": [cpu]}


def say(answer: dict[str, Any], answers: TextIO) -> None:
    """Write one answer."""
    print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    """Answer requests until there are no more."""
    # Whatever libraries print goes to stderr: stdout carries the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import numpy as np

    try:
        planner = PLANNERS[sys.argv[1]]()
    except ImportError as error:
        say({"error": f"{type(error).__name__}: {error}"}, answers)
        return
    versions = {"python": sys.version.split()[0], "numpy": np.__version__}
    say({"versions": planner.versions | versions}, answers)
    case: Case | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.get("again"):
                say(time_again(case), answers)
                continue
            case, answer = plan_case(planner, request)
            say(answer, answers)
        except Exception as error:  # a planner that cannot do a case is part of the result
            say({"error": f"{type(error).__name__}: {error}"}, answers)


if __name__ == "__main__":
    main()
