"""Choose the plan of the soft form: balance against load that leaves its home node."""

from __future__ import annotations

import numpy as np

from ...core.errors import PlacementError
from ..figures import Windows, overall
from ..kernels.state import Ranks
from ..options import Nearness
from ..result import Draft, LocalityPoint
from .locality import load_leaving, relax_layers

LOCALITY_TARGETS = (1.6, 1.4, 1.25, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01, 1.003)
"""Busiest rank's time over the mean that is planned for, from loose to tight."""


def soft_plan(
    mean: np.ndarray, ranks: Ranks, homes: np.ndarray, table: np.ndarray, near: Nearness
) -> Draft:
    """Relax a hierarchical plan to every target, and choose the cheapest that may be had.

    Args:
        mean: float64 [layers, experts], load.
        ranks: sorted by node.
        homes: int64 [layers, groups], node of each group.
        table: int32 [layers, slots], the hierarchical plan.
        near: what load that leaves costs, and how much may.

    Raises:
        PlacementError: for a negative price, or a share that is none.
    """
    if not near.penalty >= 0:
        raise PlacementError(f"locality_penalty {near.penalty}: give 0 or more")
    if near.max_leaving is not None and not 0 <= near.max_leaving <= 1:
        raise PlacementError(f"max_leaving {near.max_leaving}: give a share of the load, 0 to 1")
    windows = Windows(mean[None], np.ones(1))
    expert_home = np.repeat(homes, mean.shape[1] // homes.shape[1], axis=1)
    node_of_slot = ranks.node_of[ranks.rank_of]
    tables, curve = [table], [LocalityPoint(overall(windows, ranks, table), 0.0)]
    for target in LOCALITY_TARGETS:
        relaxed = table.copy()
        relax_layers(mean, expert_home, ranks, ranks.total_slowness, target, relaxed)
        leaving = load_leaving(mean, relaxed, expert_home, node_of_slot)
        tables.append(relaxed)
        curve.append(LocalityPoint(overall(windows, ranks, relaxed), leaving))
    best, best_cost = 0, np.inf
    for k, point in enumerate(curve):
        if near.max_leaving is not None and point.leaving > near.max_leaving:
            continue
        cost = 1.0 / point.balancedness + near.penalty * point.leaving
        if cost < best_cost:
            best, best_cost = k, cost
    return Draft(tables[best], curve[best].leaving, tuple(curve))
