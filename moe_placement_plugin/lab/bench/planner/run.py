"""Compare planners for ``moe-placement bench planner``: side by side, in one run, on one machine.

Every suite returns rows of plain data; `report` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ....core.errors import PlacementError
from . import families
from .contestants import Contestant
from .families import Shape
from .measures import balancedness as balancedness
from .measures import bound, layer_ratio, moved
from .measures import machine as machine
from .measures import read_traces as read_traces
from .own_suites import coactivation_suite as coactivation_suite
from .own_suites import locality_suite as locality_suite
from .own_suites import workloads_suite as workloads_suite

FRESH = (
    "vLLM default",
    "SGLang deepseek",
    "SGLang deepseek_vec",
    "DeepSeek reference",
    "fast",
    "best",
)
SUITES = ("traces", "synthetic", "moves", "workloads", "locality", "coactivation")
TRACE_SHAPES = (
    ("32 ranks, 288 slots", 32, 32),
    ("72 ranks, 288 slots", 72, 32),
    ("32 ranks, no redundancy", 32, 0),
    ("144 ranks, 288 slots", 144, 32),
)


def _compare(
    contestants: Sequence[Contestant],
    load: np.ndarray,
    following: np.ndarray,
    shape: Shape,
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Ask every planner for a plan of one case.

    Args:
        contestants: the planners.
        load: int64 [layers, experts].
        following: the next window.
        shape: of the cluster.
        repeats: timed calls; the median counts.

    Returns:
        Figures by planner; one that refuses the case has the reason under "error".
    """
    row: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    for contestant in contestants:
        try:
            answer = contestant.ask(
                load, shape.slots, shape.ranks, shape.groups, shape.nodes, repeats=1
            )
        except PlacementError as error:
            row[contestant.name] = {"error": str(error)}
            continue
        mean, most = layer_ratio(load, answer.table, shape.ranks)
        row[contestant.name] = {
            "balancedness": float(mean.sum() / most.sum()),
            "next": balancedness(following, answer.table, shape.ranks),
            "worst_layer": float((mean / most).min()),
        }
        seconds[contestant.name] = list(zip(answer.seconds, answer.cpu_seconds, strict=True))
    # Round after round over all planners: what else the machine does then hits all of them alike.
    for _ in range(repeats - 1):
        for contestant in contestants:
            if contestant.name in seconds:
                seconds[contestant.name].append(contestant.again())
    for name, times in seconds.items():
        row[name]["ms"], row[name]["cpu_ms"] = (float(v) * 1e3 for v in np.median(times, axis=0))
    return row


def _after_drift(load: np.ndarray) -> np.ndarray:
    """Redraw a trace, int64 [layers, experts], after one step of drift."""
    rng = np.random.default_rng(0)
    totals = load.sum(axis=1)
    popularity = families.drift(load / np.maximum(totals[:, None], 1), rng)
    return np.stack([rng.multinomial(int(n), p) for n, p in zip(totals, popularity)])


def traces_suite(
    contestants: Sequence[Contestant],
    traces: dict[str, np.ndarray],
    repeats: int,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Plan every trace on every cluster; the next window is a redraw after one step of drift."""
    rows = []
    for name, load in traces.items():
        following = _after_drift(load)
        layers, experts = load.shape
        for label, ranks, redundant in TRACE_SHAPES:
            slots = experts + redundant
            if slots % ranks:
                continue
            report(f"{name}, {label}")
            shape = Shape(label, layers, experts, ranks, slots)
            found = _compare(contestants, load, following, shape, repeats)
            rows.append(
                {
                    "case": name,
                    "shape": label,
                    "bound": bound(load, ranks, slots),
                    "planners": found,
                }
            )
    return rows


def synthetic_suite(
    contestants: Sequence[Contestant],
    layers: int,
    repeats: int,
    report: Callable[[str], None],
    shapes: Iterable[Shape] = families.SHAPES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Plan every load family on every model and cluster shape."""
    rows = []
    for shape in shapes:
        report(shape.name)
        for family in families.FAMILIES:
            load, following = families.windows(family, shape, 2, seed, min(layers, shape.layers))
            found = _compare(contestants, load, following, shape, repeats)
            rows.append(
                {
                    "case": shape.name,
                    "family": family,
                    "kind": shape.kind,
                    "bound": bound(load, shape.ranks, shape.slots, shape.groups, shape.nodes),
                    "planners": found,
                }
            )
    return rows


def _chain(
    contestant: Contestant,
    loads: Sequence[np.ndarray],
    table: np.ndarray,
    ranks: int,
    repeats: int,
) -> dict[str, float]:
    """Rebalance window after window, each from the one before; return figures over the windows.

    Args:
        contestant: the planner.
        loads: int64 [layers, experts] each.
        table: int [layers, slots], the placement at first.
        ranks: with equal slots.
        repeats: timed calls per window.
    """
    moves, planned, following, seconds, cpu = [], [], [], [], []
    for k, load in enumerate(loads):
        answer = contestant.ask(load, table.shape[1], ranks, repeats=repeats, old=table)
        moves.append(moved(table, answer.table, ranks))
        planned.append(balancedness(load, answer.table, ranks))
        if k + 1 < len(loads):
            following.append(balancedness(loads[k + 1], answer.table, ranks))
        seconds.append(answer.milliseconds)
        cpu.append(float(np.median(answer.cpu_seconds)) * 1e3)
        table = answer.table
    result = {
        "moved": float(np.mean(moves)),
        "planned": float(np.mean(planned)),
        "lowest": float(np.min(planned)),
        "cpu_ms": float(np.median(cpu)),
        "ms": float(np.median(seconds)),
    }
    return result | ({"next": float(np.mean(following))} if following else {})


def moves_suite(
    by_name: Mapping[str, Contestant],
    traces: dict[str, np.ndarray],
    repeats: int,
    report: Callable[[str], None],
    windows: int = 20,
) -> list[dict[str, Any]]:
    """Rebalance over drifting windows, then between every ordered pair of traces.

    vLLM's policy stands against the plan with few moves, each from its own plan.
    """
    rows = _drifting_rows(by_name, repeats, report, windows)
    for source, load in traces.items():
        report(f"from {source}")
        if (load.shape[1] + 32) % 32 == 0:
            rows += _pair_rows(by_name, traces, source, repeats)
    return rows


def _drifting_rows(
    by_name: Mapping[str, Contestant], repeats: int, report: Callable[[str], None], windows: int
) -> list[dict[str, Any]]:
    """Rebalance two models over drifting windows."""
    vllm, best, replan = by_name.get("vLLM default"), by_name["best"], by_name["replan"]
    rows = []
    for label, shape in (
        ("R1-like, drifting", Shape("", 58, 256, 32, 288)),
        ("Qwen3-235B-like, drifting", Shape("", 94, 128, 16, 144)),
    ):
        report(label)
        loads = families.windows("lognormal", shape, windows + 1, 1)
        row: dict[str, Any] = {"case": label, "slots": shape.layers * shape.slots}
        for name, contestant, first in (("vLLM default", vllm, vllm), ("replan", replan, best)):
            if contestant is not None and first is not None:
                table = first.ask(loads[0], shape.slots, shape.ranks, repeats=1).table
                row[name] = _chain(contestant, list(loads[1:]), table, shape.ranks, repeats)
        rows.append(row)
    return rows


def _pair_rows(
    by_name: Mapping[str, Contestant], traces: Mapping[str, np.ndarray], source: str, repeats: int
) -> list[dict[str, Any]]:
    """Rebalance from one trace to every other one, on 32 ranks with 32 redundant slots."""
    vllm, best, replan = by_name.get("vLLM default"), by_name["best"], by_name["replan"]
    old_load = traces[source]
    slots = old_load.shape[1] + 32
    tables = {
        c.name: c.ask(old_load, slots, 32, repeats=1).table for c in (vllm, best) if c is not None
    }
    rows = []
    for target, load in traces.items():
        if target == source or load.shape != old_load.shape:
            continue
        row: dict[str, Any] = {"case": f"{source} -> {target}", "slots": load.shape[0] * slots}
        if vllm is not None:
            row["vLLM default"] = _chain(vllm, [load], tables["vLLM default"], 32, 1)
        row["replan"] = _chain(replan, [load], tables["best"], 32, repeats)
        row["fresh"] = balancedness(load, best.ask(load, slots, 32, repeats=1).table, 32)
        rows.append(row)
    return rows
