"""Take load off the busiest rank by swaps.

`swap_hot_cold` works on float64 loads, all else on the integers of `layer`.
"""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import busiest, exchange, may_swap


@inner_kernel
def swap_hot_cold(state, start, max_swaps, target):
    """Swap replicas of the busiest and the least busy rank while that lowers the busier one.

    The cheap refinement of the fast mode; ranks of equal speed.

    Args:
        state: `LayerState` with floats, updated.
        start: int64 [ranks + 1].
        max_swaps: swaps at most.
        target: float64, stop when no rank is above this.
    """
    _, replicas, expert_of, share_of, rank_load = state
    for _ in range(max_swaps):
        hot = np.int64(0)
        cold = np.int64(-1)
        high = rank_load[0]
        low = np.inf
        for r in range(rank_load.size):
            v = rank_load[r]
            if v > high:
                high = v
                hot = r
            if v < low and start[r + 1] > start[r]:
                low = v
                cold = r
        if high <= target or cold < 0:
            return
        ideal = (high - low) * 0.5
        best = ideal  # |step - ideal| < ideal means that both ranks end below `high`
        best_i = np.int64(-1)
        best_j = np.int64(-1)
        for i in range(start[hot], start[hot + 1]):
            wanted = share_of[i] - ideal
            for j in range(start[cold], start[cold + 1]):
                miss = abs(share_of[j] - wanted)
                if miss < best:
                    if not may_swap(expert_of, replicas, start, i, j, hot, cold):
                        continue
                    best = miss
                    best_i = i
                    best_j = j
        if best_i < 0 or best > ideal * 0.999999:
            return
        exchange(state, best_i, best_j, hot, cold)


@inner_kernel
def _best_partner(top, load_hot, shares, loads):
    """Return the load of the busier rank after the best exchange of a replica of the busiest rank.

    Args:
        top: int64, load of the replica.
        load_hot: int64, of the busiest rank.
        shares: int64 [slots], load of each slot's replica.
        loads: int64 [slots], load of each slot's rank.
    """
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        best = min(best, max(load_hot - step, loads[s] + step))
    return best


@inner_kernel
def _best_partner_uneven(top, load_hot, slow_hot, shares, loads, slowness):
    """Return as `_best_partner`, in time, for ranks of different speed; slowness int64 [slots]."""
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        best = min(best, max((load_hot - step) * slow_hot, (loads[s] + step) * slowness[s]))
    return best


@inner_kernel
def _best_allowed_partner(state, ranks, i, hot, limit):
    """Find the best partner of a slot, leaving out exchanges that put an expert twice on a rank.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        i: the slot.
        hot: its rank, the busiest.
        limit: int64, time that the exchange has to beat.

    Returns:
        (time, slot); slot is -1 if nothing is below `limit`.
    """
    _, replicas, expert_of, share_of, rank_load = state
    start = ranks.start
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    best = limit
    best_j = -1
    top = share_of[i]
    for j in range(expert_of.size):
        q = rank_of[j]
        step = top - share_of[j]
        v = max((rank_load[hot] - step) * slowness[hot], (rank_load[q] + step) * slowness[q])
        if v < best and q != hot and may_swap(expert_of, replicas, start, i, j, hot, q):
            best = v
            best_j = j
    return best, best_j


@inner_kernel
def _best_swap(state, ranks, slot_slowness, slot_load, hot, lowest):
    """Find the swap off the busiest rank that lowers it most.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        slot_slowness: int64 [slots], slowness of each slot's rank; empty if all ranks are equal.
        slot_load: int64 [slots], load of each slot's rank.
        hot: the busiest rank.
        lowest: int64 [slots], scratch.

    Returns:
        (slot here, slot there); -1 if no swap lowers it.
    """
    share_of = state.share_of
    load_hot = state.rank_load[hot]
    slow_hot = ranks.slowness[hot]
    first = ranks.start[hot]
    width = ranks.start[hot + 1] - first
    # The lowest that each replica could bring it to, and then the replica that could do best first:
    # mostly it is allowed to.
    for k in range(width):
        top = share_of[first + k]
        if slot_slowness.size > 0:
            lowest[k] = _best_partner_uneven(
                top, load_hot, slow_hot, share_of, slot_load, slot_slowness
            )
        else:
            lowest[k] = _best_partner(top, load_hot, share_of, slot_load)
    high = load_hot * slow_hot
    best = high
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    while True:
        k = np.int64(-1)
        least = best
        for m in range(width):
            if lowest[m] < least:
                least = lowest[m]
                k = m
        if k < 0:
            return best_i, best_j
        lowest[k] = high
        v, j = _best_allowed_partner(state, ranks, first + k, hot, best)
        if j >= 0:
            best = v
            best_i = first + k
            best_j = j


@inner_kernel(makes_arrays=True)
def descend(state, ranks, slot_slowness, slot_load, target):
    """Swap replicas off the busiest rank until it is at a target or no swap lowers it.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        slot_slowness: int64 [slots], slowness of each slot's rank; empty if all ranks are equal.
        slot_load: int64 [slots], the load of each slot's rank, written.
        target: int64, time.

    Returns:
        Busiest rank.
    """
    rank_load = state.rank_load
    start = ranks.start
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    for s in range(slot_load.size):
        slot_load[s] = rank_load[rank_of[s]]
    lowest = np.empty(slot_load.size, np.int64)
    swaps = 0
    while True:
        hot, high = busiest(rank_load, slowness)
        if high <= target or swaps >= 4 * slot_load.size:
            return hot
        i, j = _best_swap(state, ranks, slot_slowness, slot_load, hot, lowest)
        if i < 0:
            return hot
        other = rank_of[j]
        exchange(state, i, j, hot, other)
        for s in range(start[hot], start[hot + 1]):
            slot_load[s] = rank_load[hot]
        for s in range(start[other], start[other + 1]):
            slot_load[s] = rank_load[other]
        swaps += 1
