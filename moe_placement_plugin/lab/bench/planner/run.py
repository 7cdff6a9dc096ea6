"""``moe-placement bench planner``: planners side by side, in one run, on one machine.

Every suite returns rows of plain data; `planner_report` prints them. Balancedness of a load under a plan is the sum over layers of the
mean rank load over
the sum of the largest.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ....core.errors import PlacementError
from ....formats.load_file import read_load
from ....planner import coactivation_of, crossings_per_token, plan
from ....planner.arguments import as_ranks
from ....planner.nodes.groups import group_homes
from . import families
from .contestants import Contestant

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


def machine() -> dict:
    """Processor, number of CPUs this process may use, and load at the start."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            model,
        )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cpus": cpus,
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
    }


def layer_ratio(load: np.ndarray, table: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean rank load, largest rank load) of every layer, float64 [layers] each; ranks with equal slots."""
    layers, slots = table.shape
    count = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
    if (count == 0).any():
        raise PlacementError(
            f"a planner left out expert {np.argwhere(count == 0)[0][1]}: its plan cannot serve"
        )
    share = np.take_along_axis(load / count, table.astype(np.int64), axis=1)
    by_rank = share.reshape(layers, ranks, slots // ranks).sum(axis=2)
    return by_rank.mean(axis=1), by_rank.max(axis=1)


def balancedness(load: np.ndarray, table: np.ndarray, ranks: int) -> float:
    """Sum of mean over sum of largest rank loads."""
    mean, most = layer_ratio(load, table, ranks)
    return float(mean.sum() / most.sum())


def moved(old: np.ndarray, new: np.ndarray, ranks: int) -> int:
    """Slots whose rank did not hold the expert before, over all layers."""
    before = old.reshape(old.shape[0], ranks, 1, -1)
    after = new.reshape(new.shape[0], ranks, -1, 1)
    return int((~(before == after).any(axis=3)).sum())


def read_traces(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Loads by name, int64 [layers, experts], windows added up; files or folders with .json and .safetensors loads."""
    files: list[Path] = []
    for path in paths:
        files += (
            sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
            if path.is_dir()
            else [path]
        )
    return {f.stem: read_load(f).moe_layers().total.astype(np.int64) for f in files}


def _compare(contestants: Sequence[Contestant], load, following, shape, repeats: int) -> dict:
    """One case for all: {planner: figures}; a planner that refuses the case has the reason under "error"."""
    _, ranks, slots, groups, nodes = shape
    row: dict = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    for contestant in contestants:
        try:
            answer = contestant.ask(load, slots, ranks, groups, nodes, repeats=1)
        except PlacementError as error:
            row[contestant.name] = {"error": str(error)}
            continue
        mean, most = layer_ratio(load, answer.table, ranks)
        row[contestant.name] = {
            "balancedness": float(mean.sum() / most.sum()),
            "next": balancedness(following, answer.table, ranks),
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


def _bound(load: np.ndarray, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> float:
    """Upper bound of the balancedness of any plan (hierarchical if nodes > 1)."""
    where = as_ranks(np.full(ranks, slots // ranks), np.arange(ranks) * nodes // ranks)
    _, busiest = group_homes(
        load.astype(np.float64), where, groups if nodes > 1 else 1, thorough=True
    )
    return float(load.sum() / ranks / busiest.sum())


def traces_suite(
    contestants, traces: dict[str, np.ndarray], repeats: int, report: Callable[[str], None]
) -> list[dict]:
    """Every trace on every cluster; the next window is a redraw of the trace after one step of drift."""
    rows = []
    for name, load in traces.items():
        rng = np.random.default_rng(0)
        popularity = load / np.maximum(load.sum(axis=1, keepdims=True), 1)
        following = np.stack(
            [
                rng.multinomial(int(n), p)
                for n, p in zip(load.sum(axis=1), families.drift(popularity, rng))
            ]
        )
        for label, ranks, redundant in TRACE_SHAPES:
            slots = load.shape[1] + redundant
            if slots % ranks:
                continue
            report(f"{name}, {label}")
            found = _compare(contestants, load, following, (label, ranks, slots, 1, 1), repeats)
            rows.append(
                {
                    "case": name,
                    "shape": label,
                    "bound": _bound(load, ranks, slots),
                    "planners": found,
                }
            )
    return rows


def synthetic_suite(
    contestants,
    layers: int,
    repeats: int,
    report: Callable[[str], None],
    shapes=families.SHAPES,
    seed: int = 0,
) -> list[dict]:
    """Model and cluster shapes x load families."""
    rows = []
    for shape in shapes:
        report(shape.name)
        for family in families.FAMILIES:
            load, following = families.windows(family, shape, 2, seed, min(layers, shape.layers))
            found = _compare(
                contestants,
                load,
                following,
                (shape.name, shape.ranks, shape.slots, shape.groups, shape.nodes),
                repeats,
            )
            bound = _bound(load, shape.ranks, shape.slots, shape.groups, shape.nodes)
            rows.append(
                {
                    "case": shape.name,
                    "family": family,
                    "kind": shape.kind,
                    "bound": bound,
                    "planners": found,
                }
            )
    return rows


def _chain(
    contestant: Contestant, loads, start_table, ranks: int, slots: int, repeats: int, **more
) -> dict:
    """Rebalance window after window, each from the one before."""
    table, moves, planned, following, seconds, cpu = start_table, [], [], [], [], []
    for k, load in enumerate(loads):
        answer = contestant.ask(load, slots, ranks, repeats=repeats, old=table, **more)
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
    by_name: dict[str, Contestant],
    traces: dict[str, np.ndarray],
    repeats: int,
    report: Callable[[str], None],
    windows: int = 20,
) -> list[dict]:
    """Drifting windows, then every ordered pair of traces: vLLM's policy against the move-limited plan, each from its own plan."""
    vllm, best, replan = by_name.get("vLLM default"), by_name["best"], by_name["replan"]
    rows = []
    drifting = [
        ("R1-like, drifting", families.Shape("", 58, 256, 32, 288)),
        ("Qwen3-235B-like, drifting", families.Shape("", 94, 128, 16, 144)),
    ]
    for label, shape in drifting:
        report(label)
        loads = families.windows("lognormal", shape, windows + 1, 1)
        row = {"case": label, "slots": shape.layers * shape.slots}
        for name, contestant, first in (("vLLM default", vllm, vllm), ("replan", replan, best)):
            if contestant is not None and first is not None:
                table = first.ask(loads[0], shape.slots, shape.ranks, repeats=1).table
                row[name] = _chain(contestant, loads[1:], table, shape.ranks, shape.slots, repeats)
        rows.append(row)
    for source, old_load in traces.items():
        report(f"from {source}")
        slots = old_load.shape[1] + 32
        if slots % 32:
            continue
        tables = {
            c.name: c.ask(old_load, slots, 32, repeats=1).table
            for c in (vllm, best)
            if c is not None
        }
        for target, load in traces.items():
            if target == source or load.shape != old_load.shape:
                continue
            row = {"case": f"{source} -> {target}", "slots": load.shape[0] * slots}
            if vllm is not None:
                row["vLLM default"] = _chain(vllm, [load], tables["vLLM default"], 32, slots, 1)
            row["replan"] = _chain(replan, [load], tables["best"], 32, slots, repeats)
            row["fresh"] = balancedness(load, best.ask(load, slots, 32, repeats=1).table, 32)
            rows.append(row)
    return rows


def workloads_suite(
    by_name: dict[str, Contestant],
    traces: dict[str, np.ndarray],
    report: Callable[[str], None],
    ranks: int = 32,
    redundant: int = 32,
) -> list[dict]:
    """Plan on every four of the traces together, judge on those and on the others; against planning on their mean."""
    names = list(traces)
    rows = []
    for trained in combinations(names, 4):
        others = [n for n in names if n not in trained]
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
            "together": _worst(traces, trained, others, table, ranks),
        }
        for name in ("vLLM default", "best"):
            if name in by_name:
                on_mean = by_name[name].ask(mean, slots, ranks, repeats=1).table
                row[f"{name} on the mean"] = _worst(traces, trained, others, on_mean, ranks)
        rows.append(row)
    return rows


def _worst(traces, trained, others, table, ranks: int) -> dict:
    def worst(names):
        return min((balancedness(traces[n], table, ranks) for n in names), default=None)

    return {"trained": worst(trained), "others": worst(others)}


def locality_suite(
    traces: dict[str, np.ndarray],
    report: Callable[[str], None],
    ranks: int = 32,
    nodes: int = 4,
    groups: int = 8,
) -> list[dict]:
    """Hierarchical plans against their bound, and the soft form's curve."""
    rows = []
    for name, load in traces.items():
        for redundant in (0, 32):
            slots = load.shape[1] + redundant
            if slots % ranks or load.shape[1] % groups:
                continue
            report(f"{name}, {slots} slots")
            where: dict[str, Any] = {
                "node_of_rank": np.arange(ranks) * nodes // ranks,
                "num_groups": groups,
            }
            begin = time.perf_counter()
            soft = plan(
                load,
                np.full(ranks, slots // ranks),
                locality="soft",
                max_leaving=0.15,
                locality_penalty=0.0,
                **where,
            )
            rows.append(
                {
                    "case": name,
                    "slots": slots,
                    "hierarchical": soft.locality_curve[0].balancedness,
                    "bound": _bound(load, ranks, slots, groups, nodes),
                    "curve": [[p.leaving, p.balancedness] for p in soft.locality_curve],
                    "at_most_15%": [soft.leaving, soft.overall],
                    "seconds": time.perf_counter() - begin,
                }
            )
    return rows


def coactivation_suite(
    paths: Sequence[Path], report: Callable[[str], None], ranks: int = 8, experts: int | None = None
) -> list[dict]:
    """Crossings per token on token-level traces (.npz with ``topk_ids`` [layers, tokens, top_k]): planned on one half, counted on the
    other."""
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
        slots = np.full(ranks, num_experts // ranks)
        for nodes in (2, 4):
            report(f"{path.stem}, {nodes} nodes")
            node_of = np.arange(ranks) * nodes // ranks
            linear = np.tile(np.arange(num_experts), (ids.shape[0], 1))
            tables = {
                "linear": linear,
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
            rank_of_slot = np.repeat(np.arange(ranks), slots)
            for name, table in tables.items():
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
