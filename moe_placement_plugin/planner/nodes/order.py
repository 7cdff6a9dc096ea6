"""Bring ranks in order of their node, and plans for them back to the given order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.state import Ranks, make_ranks


@dataclass(frozen=True)
class NodeOrder:
    """Hold ranks in order of their node; made by `by_node`.

    Attributes:
        ranks: nodes ascending, numbered from 0 without gaps.
        slot_order: int64 [slots], the given slot of each slot of these ranks.
    """

    ranks: Ranks
    slot_order: np.ndarray

    def sort(self, table: np.ndarray) -> np.ndarray:
        """Return a table, int32 [layers, slots], in this order."""
        return np.ascontiguousarray(table[:, self.slot_order])

    def restore(self, table: np.ndarray) -> np.ndarray:
        """Return a table of this order, int32 [layers, slots], in the given one."""
        given = np.empty_like(table)
        given[:, self.slot_order] = table
        return given


def by_node(ranks: Ranks) -> NodeOrder:
    """Bring ranks in order of their node."""
    _, node_of = np.unique(ranks.node_of, return_inverse=True)
    order = np.argsort(node_of.reshape(-1), kind="stable")
    ordered = make_ranks(
        ranks.slots_per_rank[order],
        node_of.reshape(-1)[order],
        ranks.speed[order],
        ranks.slowness[order],
    )
    slots = [np.arange(ranks.start[r], ranks.start[r + 1]) for r in order]
    return NodeOrder(ordered, np.concatenate(slots))
