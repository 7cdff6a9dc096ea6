"""Co-activation: experts that tokens choose together, kept on one node or spread over ranks.

Both are local searches over exchanges between nodes (or ranks) that keep every rank within a balance allowance. What two experts on one
node are
worth is the number of tokens that chose both; a replica stands for its share of its expert's tokens.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import (
    LOAD_SCALE,
    count_replicas,
    exchange,
    may_swap,
    measure,
    scale_load,
    sum_of,
)


@kernel
def _affinity(pairs, count, expert_of, part_of_slot, parts, affinity):
    """affinity[e, p]: tokens that chose expert e together with what part p holds, by share of the replicas."""
    affinity[:] = 0.0
    for s in range(expert_of.size):
        f = expert_of[s]
        p = part_of_slot[s]
        weight = 1.0 / count[f]
        for e in range(affinity.shape[0]):
            if e != f:
                affinity[e, p] += pairs[e, f] * weight


@kernel
def cluster_layers(
    load,
    pairs,
    part_of_rank,
    start,
    rank_of,
    slowness,
    total_slowness,
    allowance,
    sign,
    sweeps,
    plan,
):
    """Exchange replicas between parts (nodes, or ranks) as long as that raises `sign` times the co-activation inside parts.

    Args:
        load: float64 [layers, experts]; pairs: float64 [layers, experts, experts], symmetric; part_of_rank: int64 [ranks];
        start: int64 [ranks + 1]; rank_of: int64 [slots]; slowness: int64 [ranks]; total_slowness: sum of 1 / slowness over ranks with
        slots; allowance: a rank's time may be this multiple of the mean, or of the busiest rank's at the start if that is more;
        sign: 1 to gather, -1 to spread; sweeps: passes over all slots at most; plan: int32 [layers, slots], updated.
    """
    layers, experts = load.shape
    slots = plan.shape[1]
    ranks = start.size - 1
    parts = part_of_rank.max() + 1
    part_of_slot = part_of_rank[rank_of]
    scaled = np.empty(experts, np.int64)
    count = np.empty(experts, np.int64)
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(ranks, np.int64)
    affinity = np.empty((experts, parts), np.float64)
    for layer in range(layers):
        total = sum_of(load[layer])
        scale_load(load[layer], total, scaled)
        expert_of = plan[layer]
        count_replicas(expert_of, count)
        measure(scaled, count, start, expert_of, share_of, rank_load)
        limit = np.int64(LOAD_SCALE / total_slowness * allowance)
        for r in range(ranks):
            limit = max(limit, rank_load[r] * slowness[r])
        w = pairs[layer]
        _affinity(w, count, expert_of, part_of_slot, parts, affinity)
        for _ in range(sweeps):
            changed = False
            for i in range(slots):
                a = expert_of[i]
                r = rank_of[i]
                p = part_of_slot[i]
                weight_a = 1.0 / count[a]
                best = 1e-9 * total
                best_j = -1
                for j in range(slots):
                    q = rank_of[j]
                    o = part_of_slot[j]
                    if o == p:
                        continue
                    b = expert_of[j]
                    if a == b:
                        continue
                    weight_b = 1.0 / count[b]
                    gain = sign * (
                        weight_a * (affinity[a, o] - affinity[a, p])
                        + weight_b * (affinity[b, p] - affinity[b, o])
                        - 2.0 * w[a, b] * weight_a * weight_b
                    )
                    if gain <= best:
                        continue
                    step = share_of[i] - share_of[j]
                    if (rank_load[r] - step) * slowness[r] > limit or (
                        rank_load[q] + step
                    ) * slowness[q] > limit:
                        continue
                    if not may_swap(i, j, r, q, count, start, expert_of):
                        continue
                    best = gain
                    best_j = j
                if best_j < 0:
                    continue
                b = expert_of[best_j]
                o = part_of_slot[best_j]
                weight_b = 1.0 / count[b]
                for e in range(experts):
                    moved_a = w[e, a] * weight_a if e != a else 0.0
                    moved_b = w[e, b] * weight_b if e != b else 0.0
                    affinity[e, p] += moved_b - moved_a
                    affinity[e, o] += moved_a - moved_b
                exchange(expert_of, share_of, rank_load, i, best_j, r, rank_of[best_j])
                changed = True
            if not changed:
                break


def coactivation_of(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Count the pairs of experts that tokens chose together.

    Args:
        topk_ids: int [layers, tokens, top_k]; num_experts: logical experts per layer.

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
    """Mean number of nodes (or ranks) beyond the first that a token's experts lie on, over all layers.

    The k-th token uses replica k mod replicas of an expert, as engines deal tokens to replicas.

    Args:
        topk_ids: int [layers, tokens, top_k]; plan: int [layers, slots]; part_of_slot: int [slots], node (or rank) of each slot.
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
