"""Take load off the busiest rank by swaps, and by changing which experts are replicated.

`swap_hot_cold` works on float64 loads; all else on the integers of `layer`.
"""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import busiest, exchange, holds, may_swap, measure, replace_replica
from ..kernels.slot_lists import list_slots, make_slot_lists
from ..kernels.state import LayerState
from .kicks import EXCHANGE, REPLACE, draw_step, next_random


@inner_kernel
def swap_hot_cold(state, start, max_swaps, target):
    """Swap replicas of the busiest and the least busy rank, while that lowers the busier of the two.

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


@inner_kernel
def best_replacement(state, ranks, hot, lists):
    """Find the change of one slot into another expert's replica that lowers the busiest rank most.

    Every expert of the busiest rank is tried as the one that gains a replica, every replica
    elsewhere of an expert that has several as the one that gives way.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        hot: the busiest rank.
        lists: `SlotLists`, written.

    Returns:
        (slot, expert); slot is -1 if nothing lowers it.
    """
    load, replicas, expert_of, share_of, rank_load = state
    start = ranks.start
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    first, following = lists
    list_slots(expert_of, lists)
    best = rank_load[hot] * slowness[hot]
    best_slot = -1
    best_expert = np.int64(-1)
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_new = load[e] // (replicas[e] + 1)
        gain = share_of[i] - share_new
        if (rank_load[hot] - gain) * slowness[hot] >= best:
            continue
        for s in range(expert_of.size):
            f = expert_of[s]
            if f == e or replicas[f] < 2:
                continue
            r = rank_of[s]
            if r == hot:
                continue
            rise = load[f] // (replicas[f] - 1) - share_of[s]
            # The rank of the slot.
            worst = (rank_load[r] - share_of[s] + share_new) * slowness[r]
            if worst >= best or holds(expert_of, start, r, e):
                continue
            t = first[f]
            while t >= 0 and worst < best:
                q = rank_of[t]
                if q != r:
                    v = rank_load[q] + rise
                    if holds(expert_of, start, q, e):
                        v -= gain
                    worst = max(worst, v * slowness[q])
                t = following[t]
            t = first[e]
            while t >= 0 and worst < best:
                q = rank_of[t]
                v = rank_load[q] - gain
                if holds(expert_of, start, q, f):
                    v += rise
                worst = max(worst, v * slowness[q])
                t = following[t]
            if worst < best:
                best = worst
                best_slot = s
                best_expert = e
    return best_slot, best_expert


@inner_kernel
def _descend_and_replace(state, ranks, slot_slowness, slot_load, lists, redundant, target):
    """Alternate swaps off the busiest rank with re-replication until both are stuck.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        slot_slowness: as for `descend`.
        slot_load: as for `descend`.
        lists: `SlotLists`, scratch.
        redundant: whether experts have several replicas.
        target: int64, time at which to stop.

    Returns:
        (busiest rank, time).
    """
    rank_load = state.rank_load
    while True:
        hot = descend(state, ranks, slot_slowness, slot_load, target)
        high = rank_load[hot] * ranks.slowness[hot]
        if high <= target or not redundant:
            return hot, high
        slot, expert = best_replacement(state, ranks, hot, lists)
        if slot < 0:
            return hot, high
        replace_replica(state, ranks.rank_of, slot, expert)


@inner_kernel(makes_arrays=True)
def refine(load, replicas, expert_of, ranks, target, kicks, seed):
    """Lower the busiest rank of one layer to `target`, as far as `kicks` allow.

    Swaps off the busiest rank alternate with re-replication (joint replicate-and-pack). Where both
    are stuck the search is kicked: a few random steps around the busiest rank, descent, and back to
    the best plan if that did not help (iterated local search).

    Args:
        load: int64 [experts].
        replicas: int64 [experts], updated.
        expert_of: int32 [slots], updated.
        ranks: `Ranks`.
        target: int64, time (load x slowness) of the busiest rank at which to stop.
        kicks: how many at most.
        seed: of the kicks.
    """
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    slots = expert_of.size
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(slowness.size, np.int64)
    state = LayerState(load, replicas, expert_of, share_of, rank_load)
    measure(state, ranks.start)
    hot, best = busiest(rank_load, slowness)
    if best <= target or slowness.size < 2:
        return
    redundant = replicas.max() > 1
    lists = make_slot_lists(load.size, slots)
    slot_load = np.empty(slots, np.int64)
    slot_slowness = np.empty(0, np.int64)
    if slowness.min() != slowness.max():
        slot_slowness = slowness[rank_of]
    random = np.full(1, seed, np.int64)
    best_expert_of = expert_of.copy()
    best_replicas = replicas.copy()
    tried = 0
    while True:
        hot, high = _descend_and_replace(
            state, ranks, slot_slowness, slot_load, lists, redundant, target
        )
        if high < best:
            best = high
            best_expert_of[:] = expert_of
            best_replicas[:] = replicas
        if best <= target or tried >= kicks:
            break
        if high > best:
            expert_of[:] = best_expert_of
            replicas[:] = best_replicas
            measure(state, ranks.start)
            hot, high = busiest(rank_load, slowness)
        tried += 1
        for _ in range(1 + next_random(random) % 3):
            what, i, j = draw_step(state, ranks, hot, redundant, random)
            if what == REPLACE:
                replace_replica(state, rank_of, j, np.int64(expert_of[i]))
            elif what == EXCHANGE:
                exchange(state, i, j, hot, rank_of[j])
    expert_of[:] = best_expert_of
    replicas[:] = best_replicas
