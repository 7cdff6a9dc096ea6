"""Relabel the ranks of a plan so that least of it differs from the placement in service."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .compiled import inner_kernel, kernel
from .evaluate import keep_slots
from .state import Ranks


class _Kinds(NamedTuple):
    """Tell which ranks may change places.

    Attributes:
        rank: int64 [ranks], equal for ranks that can be exchanged.
        node_of: int64 [ranks], without gaps.
        alike: bool [nodes, nodes], whether the ranks of two nodes can be exchanged one by one.
    """

    rank: np.ndarray
    node_of: np.ndarray
    alike: np.ndarray


class _Match(NamedTuple):
    """Hold which rank of the plan comes to which rank.

    Attributes:
        overlap: int64 [ranks in service, ranks of the plan], experts that they have in common.
        source: int64 [ranks in service], the rank of the plan.
        source_node: int64 [nodes in service], the node of the plan that ranks must come from; -1
            for any.
        taken: bool [ranks of the plan], scratch.
    """

    overlap: np.ndarray
    source: np.ndarray
    source_node: np.ndarray
    taken: np.ndarray


@inner_kernel
def _write_overlap(old, new, start, ranks_with, num_with, overlap):
    """Write how many experts each rank of one row has in common with each rank of another.

    Args:
        old: int32 [slots].
        new: int32 [slots].
        start: int64 [ranks + 1].
        ranks_with: int64 [experts, ranks], scratch.
        num_with: int64 [experts], scratch.
        overlap: int64 [ranks of `old`, ranks of `new`], written.
    """
    num_with[:] = 0
    for r in range(start.size - 1):
        for s in range(start[r], start[r + 1]):
            e = old[s]
            if num_with[e] == 0 or ranks_with[e, num_with[e] - 1] != r:
                ranks_with[e, num_with[e]] = r
                num_with[e] += 1
    overlap[:] = 0
    for q in range(start.size - 1):
        for s in range(start[q], start[q + 1]):
            e = new[s]
            for k in range(num_with[e]):
                overlap[ranks_with[e, k], q] += 1


@inner_kernel
def _match_nodes(kinds, match):
    """Match nodes that are alike, greedily by the experts that they have in common."""
    overlap, _, source_node, taken = match
    node_of = kinds.node_of
    nodes = source_node.size
    source_node[:] = -1
    taken[:] = False
    for _ in range(nodes):
        best = -1
        best_n = -1
        best_m = -1
        for n in range(nodes):
            for m in range(nodes):
                if source_node[n] >= 0 or taken[m] or not kinds.alike[n, m]:
                    continue
                shared = 0
                for r in range(node_of.size):
                    for q in range(node_of.size):
                        if node_of[r] == n and node_of[q] == m:
                            shared += overlap[r, q]
                if shared > best:
                    best = shared
                    best_n = n
                    best_m = m
        source_node[best_n] = best_m
        taken[best_m] = True


@inner_kernel
def _match_ranks(kinds, match):
    """Match ranks of one kind, greedily by the experts that they have in common."""
    overlap, source, source_node, taken = match
    kind = kinds.rank
    node_of = kinds.node_of
    source[:] = -1
    taken[:] = False
    for _ in range(source.size):
        best = -1
        best_r = -1
        best_q = -1
        for r in range(source.size):
            if source[r] >= 0:
                continue
            node = source_node[node_of[r]]
            for q in range(source.size):
                if taken[q] or kind[r] != kind[q] or overlap[r, q] <= best:
                    continue
                if node >= 0 and node != node_of[q]:
                    continue
                best = overlap[r, q]
                best_r = r
                best_q = q
        source[best_r] = best_q
        taken[best_q] = True


@kernel
def _align_layers(old, new, start, experts, kinds, keep_nodes):
    """Relabel the ranks of every layer; arguments as for `align`, the kinds are `_Kinds`."""
    ranks = start.size - 1
    ranks_with = np.empty((experts, ranks), np.int64)
    num_with = np.empty(experts, np.int64)
    match = _Match(
        np.empty((ranks, ranks), np.int64),
        np.empty(ranks, np.int64),
        np.full(kinds.alike.shape[0], -1, np.int64),
        np.empty(ranks, np.bool_),
    )
    before = np.empty(new.shape[1], np.int32)
    for layer in range(new.shape[0]):
        _write_overlap(old[layer], new[layer], start, ranks_with, num_with, match.overlap)
        if keep_nodes:
            _match_nodes(kinds, match)
        _match_ranks(kinds, match)
        before[:] = new[layer]
        for r in range(ranks):
            first = start[match.source[r]]
            for k in range(start[r + 1] - start[r]):
                new[layer, start[r] + k] = before[first + k]


def align(old: np.ndarray, new: np.ndarray, ranks: Ranks, keep_nodes: bool) -> None:
    """Relabel ranks so that they overlap the old ones most, then keep unmoved experts in place.

    Args:
        old: int32 [layers, slots], the placement in service.
        new: int32 [layers, slots], the plan, updated.
        ranks: the ranks.
        keep_nodes: relabel whole nodes first, and ranks only within a node.
    """
    facts = np.stack([ranks.slots_per_rank, ranks.slowness], axis=1)
    kind = np.unique(facts, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    node_of = np.unique(ranks.node_of, return_inverse=True)[1].reshape(-1).astype(np.int64)
    kinds_of_node = [kind[node_of == n] for n in range(ranks.num_nodes)]
    alike = np.array([[np.array_equal(n, m) for m in kinds_of_node] for n in kinds_of_node])
    kinds = _Kinds(kind, node_of, alike)
    _align_layers(old, new, ranks.start, int(old.max()) + 1, kinds, keep_nodes)
    keep_slots(old, new, ranks.start)
