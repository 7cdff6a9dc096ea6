"""Find a placement for the ranks that are left, as near to the one in force as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.errors import PlacementError
from ..core.placement import Placement


def place_lost(
    old: Placement, live_ranks: Sequence[int], load: np.ndarray | None = None
) -> Placement:
    """Put every expert that only dead ranks hold on a live one, in place of a spare replica.

    Nothing else moves: it is the quickest way back to serving, and what the next rebalance starts
    from. What has to be read is dealt out evenly over the live ranks, which read at the same time,
    as far as they have replicas to spare. Dead ranks' slots stay as they are, for engines that keep
    the size of their maps.

    Args:
        old: the placement in force.
        live_ranks: ranks that are left.
        load: tokens per expert, ``[layers, experts]``; of a rank's replicas the one goes whose loss
            adds least to another's load. Even when left out.

    Raises:
        PlacementError: when the live ranks have fewer slots than there are experts, or the load is
            of another model.
    """
    experts = old.num_logical_experts
    slots = np.flatnonzero(np.isin(old.rank_of_slot, list(live_ranks)))
    if slots.size < experts:
        raise PlacementError(
            f"live ranks {list(live_ranks)} have {slots.size} slots for {experts} experts: that "
            "many cannot be served; restart with fewer ranks, or plan for a loss with more "
            "redundant experts"
        )
    load = (
        np.ones((old.num_layers, experts)) if load is None else np.asarray(load, dtype=np.float64)
    )
    if load.shape != (old.num_layers, experts):
        raise PlacementError(
            f"load of shape {load.shape} for {old.num_layers} layers of {experts} experts: give "
            "that of the model served"
        )
    table = old.physical_to_logical.copy()
    rank_of = np.searchsorted(np.unique(old.rank_of_slot[slots]), old.rank_of_slot[slots])
    in_all = np.zeros(rank_of.max() + 1, dtype=np.int64)
    for row, tokens in zip(table, load):
        held = row[slots]
        copies = np.bincount(held, minlength=experts)
        lost = np.flatnonzero(copies == 0)
        here = np.zeros_like(in_all)
        for expert in lost[np.argsort(-tokens[lost], kind="stable")]:
            added = np.where(
                copies[held] > 1, tokens[held] / np.maximum(copies[held] - 1, 1), np.inf
            )
            order = np.lexsort((added, in_all[rank_of], here[rank_of], ~np.isfinite(added)))
            at = int(order[0])
            copies[held[at]] -= 1
            copies[expert] += 1
            held[at] = expert
            here[rank_of[at]] += 1
            in_all[rank_of[at]] += 1
        row[slots] = held
    return type(old)(table, experts, old.slots_per_rank, old.layer_ids, old.strategy)
