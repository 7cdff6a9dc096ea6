"""Measure plans, whoever made them, and name what a bench ran on.

Balancedness of a load under a plan is the sum over layers of the mean rank load over the sum of the
largest.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....core.errors import PlacementError
from ....formats.load_file import read_load
from ....planner.arguments import as_ranks
from ....planner.nodes.groups import group_homes


def machine() -> dict[str, Any]:
    """Name the processor, the CPUs that this process may use, and the load at the start."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        model = next(names, model)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cpus": cpus,
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
    }


def layer_ratio(load: np.ndarray, table: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the largest rank load of every layer, for ranks with equal slots.

    Args:
        load: [layers, experts].
        table: int [layers, slots].
        ranks: how many.

    Returns:
        float64 [layers] each.

    Raises:
        PlacementError: where a plan lacks an expert.
    """
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
    """Return the sum of mean over the sum of largest rank loads; arguments as for `layer_ratio`."""
    mean, most = layer_ratio(load, table, ranks)
    return float(mean.sum() / most.sum())


def moved(old: np.ndarray, new: np.ndarray, ranks: int) -> int:
    """Count the slots whose rank did not hold the expert before, over all layers.

    Args:
        old: int [layers, slots].
        new: int [layers, slots].
        ranks: with equal slots.
    """
    before = old.reshape(old.shape[0], ranks, 1, -1)
    after = new.reshape(new.shape[0], ranks, -1, 1)
    return int((~(before == after).any(axis=3)).sum())


def bound(load: np.ndarray, ranks: int, slots: int, groups: int = 1, nodes: int = 1) -> float:
    """Return an upper bound of the balancedness of any plan, hierarchical if there are nodes.

    Args:
        load: [layers, experts].
        ranks: with equal slots.
        slots: per layer.
        groups: of experts, each on one node.
        nodes: with equal ranks.
    """
    where = as_ranks(np.full(ranks, slots // ranks), np.arange(ranks) * nodes // ranks)
    _, busiest = group_homes(
        load.astype(np.float64), where, groups if nodes > 1 else 1, thorough=True
    )
    return float(load.sum() / ranks / busiest.sum())


def read_traces(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Read loads by name, int64 [layers, experts], windows added up.

    Args:
        paths: files, or folders with .json and .safetensors loads.
    """
    files: list[Path] = []
    for path in paths:
        files += (
            sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
            if path.is_dir()
            else [path]
        )
    return {f.stem: read_load(f).moe_layers().total.astype(np.int64) for f in files}
