"""Keep experts that tokens choose together on one node, or spread them over ranks.

Both are local searches over exchanges between nodes (or ranks) that keep every rank within a
balance allowance. What two experts on one node are worth is the number of tokens that chose both; a
replica stands for its share of its expert's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ...core.errors import PlacementError
from ..kernels.compiled import inner_kernel, kernel
from ..kernels.layer import (
    LOAD_SCALE,
    count_replicas,
    exchange,
    may_swap,
    measure,
    scale_load,
    sum_of,
)
from ..kernels.state import LayerState, Ranks
from ..options import COACTIVATION_GOALS

_SWEEPS = 20
"""Passes over all slots at most."""


class _Gains(NamedTuple):
    """Hold what exchanges in one layer are worth.

    Attributes:
        pairs: float64 [experts, experts], tokens that chose both.
        affinity: float64 [experts, parts], see `_write_affinity`.
        part_of_slot: int64 [slots].
        sign: float, 1.0 to gather, -1.0 to spread.
    """

    pairs: np.ndarray
    affinity: np.ndarray
    part_of_slot: np.ndarray
    sign: float


@inner_kernel
def _write_affinity(pairs, replicas, expert_of, part_of_slot, affinity):
    """Write the tokens that chose each expert together with what each part holds.

    Args:
        pairs: float64 [experts, experts], tokens that chose both.
        replicas: int64 [experts].
        expert_of: int32 [slots].
        part_of_slot: int64 [slots].
        affinity: float64 [experts, parts], written; replicas count by their share.
    """
    affinity[:] = 0.0
    for s in range(expert_of.size):
        f = expert_of[s]
        p = part_of_slot[s]
        weight = 1.0 / replicas[f]
        for e in range(affinity.shape[0]):
            if e != f:
                affinity[e, p] += pairs[e, f] * weight


@inner_kernel
def _exchange_affinity(pairs, replicas, a, b, p, o, affinity):
    """Bring affinities up to date: expert `a` went from part `p` to `o`, expert `b` back."""
    weight_a = 1.0 / replicas[a]
    weight_b = 1.0 / replicas[b]
    for e in range(affinity.shape[0]):
        moved_a = pairs[e, a] * weight_a if e != a else 0.0
        moved_b = pairs[e, b] * weight_b if e != b else 0.0
        affinity[e, p] += moved_b - moved_a
        affinity[e, o] += moved_a - moved_b


@inner_kernel(inlined=True)
def _best_partner(state, ranks, gains, i, limit, least):
    """Find the slot of another part with which an exchange raises the co-activation most.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        gains: `_Gains`.
        i: slot.
        limit: int64, time that no rank may exceed.
        least: float64, what is to be gained.

    Returns:
        The slot; -1 if none gains more than `least`.
    """
    _, replicas, expert_of, share_of, rank_load = state
    start, rank_of, _, _, _, slowness = ranks
    pairs, affinity, part_of_slot, sign = gains
    a = expert_of[i]
    r = rank_of[i]
    p = part_of_slot[i]
    weight_a = 1.0 / replicas[a]
    best = least
    best_j = np.int64(-1)
    for j in range(expert_of.size):
        q = rank_of[j]
        o = part_of_slot[j]
        if o == p:
            continue
        b = expert_of[j]
        if a == b:
            continue
        weight_b = 1.0 / replicas[b]
        gain = sign * (
            weight_a * (affinity[a, o] - affinity[a, p])
            + weight_b * (affinity[b, p] - affinity[b, o])
            - 2.0 * pairs[a, b] * weight_a * weight_b
        )
        if gain <= best:
            continue
        step = share_of[i] - share_of[j]
        if (rank_load[r] - step) * slowness[r] > limit:
            continue
        if (rank_load[q] + step) * slowness[q] > limit:
            continue
        if not may_swap(expert_of, replicas, start, i, j, r, q):
            continue
        best = gain
        best_j = j
    return best_j


@inner_kernel
def _cluster_layer(state, ranks, gains, limit, least):
    """Exchange replicas of one layer between parts while that gains.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        gains: `_Gains`, its affinity is updated.
        limit: int64, time that no rank may exceed.
        least: float64, what an exchange has to gain.
    """
    pairs, affinity, part_of_slot, _ = gains
    expert_of = state.expert_of
    rank_of = ranks.rank_of
    for _ in range(_SWEEPS):
        changed = False
        for i in range(expert_of.size):
            j = _best_partner(state, ranks, gains, i, limit, least)
            if j >= 0:
                a = expert_of[i]
                b = expert_of[j]
                p = part_of_slot[i]
                o = part_of_slot[j]
                _exchange_affinity(pairs, state.replicas, a, b, p, o, affinity)
                exchange(state, i, j, rank_of[i], rank_of[j])
                changed = True
        if not changed:
            break


@kernel
def cluster_layers(load, pairs, part_of_rank, ranks, most_time, sign, table):
    """Exchange replicas between parts (nodes, or ranks) while that raises co-activation inside.

    Args:
        load: float64 [layers, experts].
        pairs: float64 [layers, experts, experts], symmetric.
        part_of_rank: int64 [ranks].
        ranks: `Ranks`.
        most_time: float64, a rank's time at most, or the busiest rank's at the start if that is
            more.
        sign: 1.0 to gather, -1.0 to spread.
        table: int32 [layers, slots], updated.
    """
    layers, experts = load.shape
    slots = table.shape[1]
    part_of_slot = part_of_rank[ranks.rank_of]
    scaled = np.empty(experts, np.int64)
    replicas = np.empty(experts, np.int64)
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(ranks.slowness.size, np.int64)
    affinity = np.empty((experts, part_of_rank.max() + 1), np.float64)
    for layer in range(layers):
        expert_of = table[layer]
        total = sum_of(load[layer])
        scale_load(load[layer], total, scaled)
        count_replicas(expert_of, replicas)
        state = LayerState(scaled, replicas, expert_of, share_of, rank_load)
        measure(state, ranks.start)
        limit = np.int64(most_time)
        for r in range(rank_load.size):
            limit = max(limit, rank_load[r] * ranks.slowness[r])
        _write_affinity(pairs[layer], replicas, expert_of, part_of_slot, affinity)
        gains = _Gains(pairs[layer], affinity, part_of_slot, sign)
        _cluster_layer(state, ranks, gains, limit, 1e-9 * total)


@dataclass(frozen=True)
class Coactivation:
    """Say what is to be done about experts that tokens choose together.

    Attributes:
        pairs: float [layers, experts, experts], tokens that chose both.
        goal: one of `COACTIVATION_GOALS`.
        allowance: how far above the mean the busiest rank may get for that, as a fraction.
    """

    pairs: Any
    goal: str
    allowance: float


def cluster(mean: np.ndarray, ranks: Ranks, wish: Coactivation, table: np.ndarray) -> None:
    """Exchange replicas of a plan for the sake of co-activation.

    Args:
        mean: float64 [layers, experts], load.
        ranks: the ranks.
        wish: what for.
        table: int32 [layers, slots], updated.

    Raises:
        PlacementError: when the wish cannot be honoured.
    """
    layers, experts = mean.shape
    goal = wish.goal
    pairs = np.ascontiguousarray(wish.pairs, dtype=np.float64)
    if pairs.shape != (layers, experts, experts):
        raise PlacementError(
            f"coactivation of shape {pairs.shape}: it must be {(layers, experts, experts)} "
            "for this load"
        )
    if goal not in COACTIVATION_GOALS:
        raise PlacementError(f"coactivation_goal {goal!r}: choose node, rank or spread")
    if not wish.allowance >= 0:
        raise PlacementError(
            f"coactivation_allowance {wish.allowance}: give a fraction of 0 or more"
        )
    if goal == "node" and ranks.num_nodes == 1:
        raise PlacementError(
            "coactivation_goal node with all ranks on one node: "
            "give node_of_rank, or the goal rank or spread"
        )
    part = ranks.node_of if goal == "node" else np.arange(ranks.num_ranks)
    most_time = LOAD_SCALE / ranks.total_slowness * (1.0 + wish.allowance)
    sign = -1.0 if goal == "spread" else 1.0
    cluster_layers(mean, pairs, part, ranks, most_time, sign, table)


def coactivation_of(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the pairs of experts that tokens chose together.

    Args:
        topk_ids: int [layers, tokens, top_k].
        num_experts: logical experts per layer.

    Returns:
        int64 [layers, experts, experts], symmetric, zero on the diagonal.
    """
    layers, tokens, _ = topk_ids.shape
    pairs = np.zeros((layers, num_experts, num_experts), np.int64)
    chosen = np.zeros((tokens, num_experts), np.float32)
    for layer in range(layers):
        chosen[:] = 0
        np.put_along_axis(chosen, topk_ids[layer].astype(np.int64), 1, axis=1)
        # float32 sums of ones are exact up to 2**24 tokens at a time.
        for first in range(0, tokens, 1 << 24):
            block = chosen[first : first + (1 << 24)]
            pairs[layer] += (block.T @ block).astype(np.int64)
        np.fill_diagonal(pairs[layer], 0)
    return pairs


def crossings_per_token(topk_ids: np.ndarray, plan: np.ndarray, part_of_slot: np.ndarray) -> float:
    """Return how many nodes (or ranks) beyond the first a token's experts lie on, in the mean.

    The k-th token uses replica k mod replicas of an expert, as engines deal tokens to replicas.

    Args:
        topk_ids: int [layers, tokens, top_k].
        plan: int [layers, slots].
        part_of_slot: int [slots], node (or rank) of each slot.
    """
    layers, tokens, _ = topk_ids.shape
    parts = int(part_of_slot.max()) + 1
    total = 0
    for layer in range(layers):
        row = plan[layer].astype(np.int64)
        order = np.argsort(row, kind="stable")
        count = np.bincount(row, minlength=int(row.max()) + 1)
        first = np.concatenate([[0], np.cumsum(count)[:-1]])
        ids = topk_ids[layer].astype(np.int64)
        slot = order[first[ids] + np.arange(tokens)[:, None] % count[ids]]
        seen = np.zeros((tokens, parts), bool)
        np.put_along_axis(seen, part_of_slot[slot], True, axis=1)
        total += int(seen.sum()) - tokens
    return total / (layers * tokens)
