"""Measure what only this package's planner does: workloads together, nodes at a price, pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ....planner import coactivation_of, crossings_per_token, plan
from .contestants import Contestant
from .measures import balancedness, bound


def workloads_suite(
    by_name: Mapping[str, Contestant],
    traces: dict[str, np.ndarray],
    report: Callable[[str], None],
    ranks: int = 32,
    redundant: int = 32,
) -> list[dict[str, Any]]:
    """Plan on every four of the traces together, judge on those and on the others.

    Beside it stands what planning on their mean gives.
    """
    names = list(traces)
    rows = []
    for trained in combinations(names, 4):
        report(", ".join(trained))
        stack = np.stack([traces[n] for n in trained])
        slots = stack.shape[2] + redundant
        begin = time.perf_counter()
        table = plan(stack, np.full(ranks, slots // ranks)).physical_to_logical
        seconds = time.perf_counter() - begin

        mean = np.rint(sum(traces[n] / traces[n].sum() for n in trained) * 1e9).astype(np.int64)
        row = {
            "trained": list(trained),
            "seconds": seconds,
            "together": _judge(traces, trained, table, ranks),
        }
        for name in ("vLLM default", "best"):
            if name in by_name:
                on_mean = by_name[name].ask(mean, slots, ranks, repeats=1).table
                row[f"{name} on the mean"] = _judge(traces, trained, on_mean, ranks)
        rows.append(row)
    return rows


def _judge(
    traces: Mapping[str, np.ndarray], trained: Sequence[str], table: np.ndarray, ranks: int
) -> dict[str, float | None]:
    """Return the lowest balancedness over the traces that were planned for, and over the others."""
    found = {name: balancedness(load, table, ranks) for name, load in traces.items()}
    return {
        "trained": min(found[name] for name in trained),
        "others": min(
            (value for name, value in found.items() if name not in trained), default=None
        ),
    }


def locality_suite(
    traces: dict[str, np.ndarray],
    report: Callable[[str], None],
    ranks: int = 32,
    nodes: int = 4,
    groups: int = 8,
) -> list[dict[str, Any]]:
    """Measure hierarchical plans against their bound, and the soft form's curve."""
    rows = []
    for name, load in traces.items():
        for redundant in (0, 32):
            slots = load.shape[1] + redundant
            if slots % ranks or load.shape[1] % groups:
                continue
            report(f"{name}, {slots} slots")
            begin = time.perf_counter()
            soft = plan(
                load,
                np.full(ranks, slots // ranks),
                node_of_rank=np.arange(ranks) * nodes // ranks,
                num_groups=groups,
                locality="soft",
                max_leaving=0.15,
                locality_penalty=0.0,
            )
            rows.append(
                {
                    "case": name,
                    "slots": slots,
                    "hierarchical": soft.locality_curve[0].balancedness,
                    "bound": bound(load, ranks, slots, groups, nodes),
                    "curve": [[p.leaving, p.balancedness] for p in soft.locality_curve],
                    "at_most_15%": [soft.leaving, soft.overall],
                    "seconds": time.perf_counter() - begin,
                }
            )
    return rows


def coactivation_suite(
    paths: Sequence[Path], report: Callable[[str], None], ranks: int = 8, experts: int | None = None
) -> list[dict[str, Any]]:
    """Count crossings per token on token-level traces: planned on one half, counted on the other.

    Args:
        paths: .npz files with ``topk_ids`` [layers, tokens, top_k].
        report: told what is measured.
        ranks: of the plans.
        experts: logical experts; a power of two that holds all ids when left out.
    """
    rows = []
    for path in paths:
        with np.load(path) as data:
            ids = data["topk_ids"]
        num_experts = experts or 1 << int(ids.max()).bit_length()
        half = ids.shape[1] // 2
        first, second = ids[:, :half], ids[:, half:]
        load, following = (
            np.stack([np.bincount(x.ravel(), minlength=num_experts) for x in part])
            for part in (first, second)
        )
        pairs = coactivation_of(first, num_experts)
        rank_of_slot = np.repeat(np.arange(ranks), num_experts // ranks)
        for nodes in (2, 4):
            report(f"{path.stem}, {nodes} nodes")
            node_of = np.arange(ranks) * nodes // ranks
            for name, table in _coactivation_plans(load, pairs, node_of).items():
                rows.append(
                    {
                        "case": path.stem,
                        "nodes": nodes,
                        "plan": name,
                        "crossings": crossings_per_token(second, table, node_of[rank_of_slot]),
                        "ranks_per_token": 1 + crossings_per_token(second, table, rank_of_slot),
                        "planned": balancedness(load, table, ranks),
                        "next": balancedness(following, table, ranks),
                    }
                )
    return rows


def _coactivation_plans(
    load: np.ndarray, pairs: np.ndarray, node_of: np.ndarray
) -> dict[str, np.ndarray]:
    """Make the plans that are compared, int [layers, slots] by name, without redundant slots.

    Args:
        load: [layers, experts].
        pairs: [layers, experts, experts].
        node_of: int [ranks].
    """
    layers, experts = load.shape
    slots = np.full(node_of.size, experts // node_of.size)
    tables = {
        "linear": np.tile(np.arange(experts), (layers, 1)),
        "balance only": plan(load, slots, node_of_rank=node_of).physical_to_logical,
    }
    for allowance in (0.02, 0.05, 0.1):
        tables[f"gathered on nodes, {allowance:.0%}"] = plan(
            load,
            slots,
            node_of_rank=node_of,
            coactivation=pairs,
            coactivation_allowance=allowance,
        ).physical_to_logical
    tables["spread over ranks, 2%"] = plan(
        load,
        slots,
        coactivation=pairs,
        coactivation_goal="spread",
        coactivation_allowance=0.02,
    ).physical_to_logical
    return tables
