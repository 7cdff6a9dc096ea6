"""Count how much there is to move: bytes of rebalances under loads that drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ....planner import plan, replan
from ..planner import families
from ..planner.contestants import Contestant
from ..planner.run import balancedness

R1_EXPERT_BYTES = 44_040_192
"""An expert of DeepSeek-R1 in FP8: 3 x 7168 x 2048."""

TOLERANCES = (0.01, 0.008, 0.006, 0.005, 0.004, 0.003, 0.002, 0.001)
"""`replan`'s, tried from the loosest until its plans are as balanced as the engine's."""


def drifting(traces: dict[str, np.ndarray], windows: int = 20) -> dict[str, np.ndarray]:
    """Return loads, int64 ``[windows + 1, layers, experts]``, by the way they drift.

    Random steps away from the first trace, and a walk from trace to trace through mixtures of two
    neighbours.
    """
    shares = [load / load.sum(axis=1, keepdims=True) for load in traces.values()]
    rng = np.random.default_rng(0)
    popularity, steps = shares[0], []
    for _ in range(windows + 1):
        steps.append(families.counts(popularity, rng))
        popularity = families.drift(popularity, rng)
    found = {f"{next(iter(traces))}, drifting": np.stack(steps)}
    if len(shares) > 1:
        walk = []
        for where in np.linspace(0, len(shares) - 1, windows + 1):
            left = min(int(where), len(shares) - 2)
            mixed = (left + 1 - where) * shares[left] + (where - left) * shares[left + 1]
            walk.append(families.counts(mixed / mixed.sum(axis=1, keepdims=True), rng))
        found[f"from trace to trace ({len(shares)})"] = np.stack(walk)
    return found


def received(old: np.ndarray, new: np.ndarray, ranks: int) -> int:
    """Return how many experts ranks did not hold before, over all layers.

    An expert that a rank holds twice counts once.
    """
    layers, slots = old.shape
    count = 0
    for before, after in zip(old.reshape(layers, ranks, -1), new.reshape(layers, ranks, -1)):
        count += sum(np.setdiff1d(b, a).size for a, b in zip(before, after))
    return count


def drift_suite(
    traces: dict[str, np.ndarray],
    vllm: Contestant | None,
    report: Callable[[str], None],
    ranks: int = 32,
    redundant: int = 32,
) -> list[dict]:
    """Return the bytes that 20 rebalances move by the engine's policy and by `replan`.

    By `replan` at its own setting and at the engine's balance.

    Args:
        traces: recorded loads, int64 ``[layers, experts]``, by name.
        vllm: the engine's policy, None where it is not installed.
        report: is told what is going on.
        ranks, redundant: EP ranks and redundant experts.
    """
    rows = []
    for label, loads in drifting(traces).items():
        report(label)
        slots = loads.shape[2] + redundant
        row: dict = {
            "case": label,
            "slots": loads.shape[1] * slots,
            "expert_bytes": R1_EXPERT_BYTES,
        }
        goal = None
        if vllm is not None:
            tables = [vllm.ask(load, slots, ranks, repeats=1).table for load in loads]
            row["vLLM default"] = _chain(loads, tables, ranks)
            goal = row["vLLM default"]["balancedness"]
        first = plan(loads[0], [slots // ranks] * ranks).physical_to_logical
        row["replan"] = _chain(loads, _replanned(loads, first, slots, ranks, None), ranks)
        for tolerance in TOLERANCES if goal is not None else ():
            equal = _chain(loads, _replanned(loads, first, slots, ranks, tolerance), ranks)
            if equal["balancedness"] >= goal:
                row["replan, as balanced"] = equal | {"tolerance": tolerance}
                break
        rows.append(row)
    return rows


def _replanned(loads, first, slots: int, ranks: int, tolerance: float | None) -> list[np.ndarray]:
    tables = [first]
    planned = replan if tolerance is None else partial(replan, tolerance=tolerance)
    for load in loads[1:]:
        tables.append(planned(load, tables[-1], [slots // ranks] * ranks).physical_to_logical)
    return tables


def _chain(loads, tables: Sequence[np.ndarray], ranks: int) -> dict:
    moved = sum(received(a, b, ranks) for a, b in zip(tables, tables[1:]))
    planned = [balancedness(load, table, ranks) for load, table in zip(loads[1:], tables[1:])]
    following = [balancedness(load, table, ranks) for load, table in zip(loads[2:], tables[1:])]
    return {
        "moved": moved,
        "bytes": moved * R1_EXPERT_BYTES,
        "balancedness": float(np.mean(planned)),
        "next": float(np.mean(following)),
    }
