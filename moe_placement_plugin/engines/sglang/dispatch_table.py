"""Compute SGLang's static dispatch table, vectorized and spread evenly over an expert's replicas.

With an all-to-all back end every rank sends a logical expert's tokens to one replica, fixed by a
table (SGLang's ``compute_logical_to_rank_dispatch_physical_map``). SGLang fills it in Python loops
over layers, experts and ranks, once at start-up and again at every rebalance, and lets all ranks of
a node share that node's first replica.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.errors import PlacementError


def dispatch_table(
    logical_to_all_physical: np.ndarray,
    num_ranks: int,
    num_slots: int,
    ranks_per_node: int | None = None,
    ranks: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the slot that each rank sends each logical expert's tokens to.

    The preference is SGLang's: a replica on the rank itself, else one on its node (where that
    narrows the choice), else any. Among equally near replicas the ranks are spread so that the
    replicas serve as equal numbers of ranks as the preference allows.

    Args:
        logical_to_all_physical: integer ``[layers, experts, most replicas]``, slots of each expert,
            -1 as padding.
        num_ranks: EP ranks; slot s lies on rank ``s // (num_slots // num_ranks)``.
        num_slots: physical experts per layer.
        ranks_per_node: consecutive ranks that share a node; None when nodes do not count.
        ranks: the ranks whose rows are wanted; all when None.

    Returns:
        The same integer type, ``[wanted ranks, layers, experts]``.

    Raises:
        PlacementError: when an expert has no slot.
    """
    candidates = np.asarray(logical_to_all_physical)
    ranks = range(num_ranks) if ranks is None else ranks
    count = (candidates != -1).sum(axis=-1)
    if (count == 0).any():
        layer, expert = (int(i) for i in np.argwhere(count == 0)[0])
        raise PlacementError(
            f"layer {layer} has no slot for expert {expert}: every logical expert needs a slot"
        )
    # Most experts have one slot, the same for every rank (padding is -1, so it is the greatest);
    # the replicated ones need thought.
    table = np.repeat(candidates.max(axis=-1)[None], len(ranks), axis=0)
    rows, columns = np.nonzero(count > 1)
    if rows.size:
        spread = _Spread(
            candidates[rows, columns],
            num_ranks,
            num_slots // num_ranks,
            ranks_per_node or num_ranks,
        )
        for index, rank in enumerate(ranks):
            table[index, rows, columns] = spread.row(rank)
    return table


class _Spread:
    """Deal ranks to the replicas of n replicated experts, ``candidates`` ``[n, most replicas]``."""

    def __init__(
        self, candidates: np.ndarray, num_ranks: int, slots_per_rank: int, ranks_per_node: int
    ):
        n, width = candidates.shape
        # Replicas in slot order, so that those of a node follow each other; padding last.
        beyond = np.iinfo(candidates.dtype).max
        self.slots = np.sort(np.where(candidates == -1, beyond, candidates), axis=1)
        valid = self.slots != beyond
        replicas = valid.sum(axis=1)[:, None]
        self.row_index = np.arange(n)
        row = self.row_index[:, None]
        self.owner = np.where(valid, self.slots // slots_per_rank, num_ranks)
        nodes = -(-num_ranks // ranks_per_node)
        self.ranks_per_node = ranks_per_node

        # Columns beyond the last rank (padding, an incomplete last node) count as served already.
        own = np.zeros((n, nodes * ranks_per_node + 1), dtype=bool)
        own[:, num_ranks:] = True
        own[row, self.owner] = True
        self.own = own[:, :-1]
        node = np.where(valid, self.owner // ranks_per_node, nodes)
        on_node = np.bincount(
            (row * (nodes + 1) + node).ravel(), minlength=n * (nodes + 1)
        ).reshape(n, nodes + 1)
        self.on_node, self.first_on_node = on_node, np.cumsum(on_node, axis=1) - on_node
        # SGLang stays on the node only where that narrows the choice.
        self.narrows = (on_node > 0) & (on_node < replicas)
        lacking = ranks_per_node - self.own.reshape(n, nodes, ranks_per_node).sum(axis=2)

        # A rank with a copy of its own is served by it; the first, should it hold several.
        served = valid & np.diff(self.owner, axis=1, prepend=-1).astype(bool)
        # The ranks of a node that lack a copy take the node's replicas in turn, beginning elsewhere
        # for each expert.
        near = np.maximum(np.take_along_axis(on_node, node, axis=1), 1)
        wanting = np.pad(np.where(self.narrows[:, :-1], lacking, 0), ((0, 0), (0, 1)))
        place = np.arange(width) - np.take_along_axis(self.first_on_node, node, axis=1)
        turns = np.take_along_axis(wanting, node, axis=1) - (place - row) % near
        served = served + np.maximum(turns + near - 1, 0) // near
        # All others go wherever fewest have gone.
        more = np.where(self.narrows[:, :-1], 0, lacking)
        self.far_before = np.cumsum(more, axis=1) - more
        self.up_to = np.cumsum(_fill(served, valid, more.sum(axis=1)), axis=1)

    def row(self, rank: int) -> np.ndarray:
        """Return the slot that ``rank`` uses for each expert, ``[n]``."""
        node = rank // self.ranks_per_node
        before = (~self.own[:, node * self.ranks_per_node : rank]).sum(axis=1)
        near = self.first_on_node[:, node] + (before + self.row_index) % np.maximum(
            self.on_node[:, node], 1
        )
        far = ((self.far_before[:, node] + before)[:, None] >= self.up_to).sum(axis=1)
        pick = np.where(self.narrows[:, node], near, far)
        pick = np.where(self.own[:, rank], (self.owner == rank).argmax(axis=1), pick)
        return self.slots[self.row_index, pick]


def _fill(served: np.ndarray, valid: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return how many further ranks each replica gets, so that totals become as equal as can be.

    ``more`` ``[n]`` ranks are given out. ``served`` and ``valid`` are ``[n, replicas]``, and so is
    the result: water is poured into vessels of unequal level.
    """
    n, width = served.shape
    far = np.int64(1) << 40
    level = np.where(valid, served, far)
    # Ties go to another replica for each expert.
    turned = (np.arange(width) + np.arange(n)[:, None]) % width
    order = np.argsort(level * width + turned, axis=1)
    rising = np.take_along_axis(level, order, axis=1)
    room = rising * np.arange(1, width + 1) - np.cumsum(
        rising, axis=1
    )  # water that lifts the lowest k to the k-th level
    used = (room <= more[:, None]).sum(axis=1)
    total = np.take_along_axis(np.cumsum(rising, axis=1), used[:, None] - 1, axis=1)[:, 0] + more
    height, spare = np.divmod(total, used)
    index = np.arange(width)
    poured = np.where(index < used[:, None], height[:, None] - rising + (index < spare[:, None]), 0)
    result = np.zeros_like(level)
    np.put_along_axis(result, order, poured, axis=1)
    return result
