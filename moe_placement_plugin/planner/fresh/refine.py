"""Swaps that take load off the busiest rank, and the joint step that also changes which experts are replicated.

`swap_hot_cold` works on float64 loads; all else on the integers of `layer`.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import (
    busiest,
    exchange,
    holds,
    may_swap,
    measure,
    next_random,
    replace_replica,
)


@kernel
def swap_hot_cold(count, start, expert_of, share_of, rank_load, max_swaps, target):
    """Swap a replica of the busiest rank with one of the least busy rank, as long as that lowers the busier of the two.

    The cheap refinement of the fast mode; ranks of equal speed.

    Args:
        count: int64 [experts]; start: int64 [ranks + 1]; expert_of: int32 [slots], share_of: float64 [slots], load of each slot's
        replica, rank_load: float64 [ranks], updated; max_swaps: swaps at most;
        target: stop when no rank is above this.
    """
    ranks = start.size - 1
    for _ in range(max_swaps):
        hot = 0
        cold = -1
        high = rank_load[0]
        low = np.inf
        for r in range(ranks):
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
        best_i = -1
        best_j = -1
        for i in range(start[hot], start[hot + 1]):
            wanted = share_of[i] - ideal
            for j in range(start[cold], start[cold + 1]):
                miss = abs(share_of[j] - wanted)
                if miss < best:
                    if not may_swap(i, j, hot, cold, count, start, expert_of):
                        continue
                    best = miss
                    best_i = i
                    best_j = j
        if best_i < 0 or best > ideal * 0.999999:
            return
        exchange(expert_of, share_of, rank_load, best_i, best_j, hot, cold)


@kernel
def _best_partner(top, load_hot, shares, loads):
    """Load of the busier rank after the best exchange of a replica of load `top`, over slots of (share, load of the slot's rank)."""
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        best = min(best, max(load_hot - step, loads[s] + step))
    return best


@kernel
def _best_partner_uneven(top, load_hot, slow_hot, shares, loads, slowness):
    """As `_best_partner`, in time, for ranks of different speed."""
    best = np.int64(1 << 62)
    for s in range(shares.size):
        step = top - shares[s]
        best = min(best, max((load_hot - step) * slow_hot, (loads[s] + step) * slowness[s]))
    return best


@kernel
def _best_allowed_partner(
    i,
    hot,
    count,
    start,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    low_slot,
    high_slot,
    limit,
):
    """As `_best_partner` for slot `i`, leaving out exchanges that would put an expert twice on a rank.

    Returns:
        (time, slot); slot is -1 if nothing is below `limit`.
    """
    best = limit
    best_j = -1
    top = share_of[i]
    for j in range(low_slot, high_slot):
        q = rank_of[j]
        step = top - share_of[j]
        v = max((rank_load[hot] - step) * slowness[hot], (rank_load[q] + step) * slowness[q])
        if v < best and q != hot and may_swap(i, j, hot, q, count, start, expert_of):
            best = v
            best_j = j
    return best, best_j


@kernel
def descend(
    count,
    start,
    rank_of,
    rank_first,
    rank_last,
    slowness,
    slot_slowness,
    expert_of,
    share_of,
    rank_load,
    slot_load,
    target,
    max_swaps,
):
    """Swap replicas off the busiest rank until it is at `target`, no swap lowers it, or `max_swaps` were made.

    Args:
        rank_first, rank_last: only ranks [rank_first, rank_last) take part (one node of a hierarchical plan).
        slowness: int64 [ranks]; slot_slowness: int64 [slots], the same by slot, or empty if all ranks are equal.
        share_of: int64 [slots]; rank_load: int64 [ranks]; slot_load: int64 [slots], the load of each slot's rank, written.

    Returns:
        Busiest rank.
    """
    swaps = 0
    low_slot = start[rank_first]
    high_slot = start[rank_last]
    for s in range(low_slot, high_slot):
        slot_load[s] = rank_load[rank_of[s]]
    shares = share_of[low_slot:high_slot]
    loads = slot_load[low_slot:high_slot]
    uneven = slot_slowness.size > 0
    lowest = np.empty(expert_of.size, np.int64)
    while True:
        hot, high = busiest(rank_load, slowness, rank_first, rank_last)
        if high <= target or swaps >= max_swaps:
            return hot
        best = high
        best_i = -1
        best_j = -1
        # The lowest that each replica could bring it to, and then the replica that could do best first: mostly it is allowed to.
        first = start[hot]
        width = start[hot + 1] - first
        for k in range(width):
            if uneven:
                lowest[k] = _best_partner_uneven(
                    share_of[first + k],
                    rank_load[hot],
                    slowness[hot],
                    shares,
                    loads,
                    slot_slowness[low_slot:high_slot],
                )
            else:
                lowest[k] = _best_partner(share_of[first + k], rank_load[hot], shares, loads)
        while True:
            k = -1
            least = best
            for m in range(width):
                if lowest[m] < least:
                    least = lowest[m]
                    k = m
            if k < 0:
                break
            lowest[k] = high
            v, j = _best_allowed_partner(
                first + k,
                hot,
                count,
                start,
                rank_of,
                slowness,
                expert_of,
                share_of,
                rank_load,
                low_slot,
                high_slot,
                best,
            )
            if j >= 0:
                best = v
                best_i = first + k
                best_j = j
        if best_i < 0:
            return hot
        other = rank_of[best_j]
        exchange(expert_of, share_of, rank_load, best_i, best_j, hot, other)
        for s in range(start[hot], start[hot + 1]):
            slot_load[s] = rank_load[hot]
        for s in range(start[other], start[other + 1]):
            slot_load[s] = rank_load[other]
        swaps += 1


@kernel
def best_replacement(
    load,
    count,
    start,
    rank_of,
    rank_first,
    rank_last,
    slowness,
    expert_of,
    share_of,
    rank_load,
    hot,
    first_slot,
    next_slot,
):
    """The change of one slot into another expert's replica that lowers the busiest rank most.

    Every expert of the busiest rank is tried as the one that gains a replica, every replica elsewhere of an expert that has several as
    the one that gives way.

    Args:
        first_slot: int64 [experts], next_slot: int64 [slots]: scratch for the list of slots of each expert.

    Returns:
        (busiest of the ranks that change, slot, expert); slot is -1 if nothing lowers it.
    """
    slots = expert_of.size
    first_slot[:] = -1
    for s in range(slots - 1, -1, -1):
        next_slot[s] = first_slot[expert_of[s]]
        first_slot[expert_of[s]] = s
    best = rank_load[hot] * slowness[hot]
    best_slot = -1
    best_expert = -1
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        gain = share_of[i] - load[e] // (count[e] + 1)
        if (rank_load[hot] - gain) * slowness[hot] >= best:
            continue
        for s in range(start[rank_first], start[rank_last]):
            f = expert_of[s]
            if f == e or count[f] < 2:
                continue
            r = rank_of[s]
            if r == hot:
                continue
            rise = load[f] // (count[f] - 1) - share_of[s]
            # The rank of the slot.
            worst = (rank_load[r] - share_of[s] + load[e] // (count[e] + 1)) * slowness[r]
            if worst >= best or holds(expert_of, start, r, e):
                continue
            t = first_slot[f]
            while t >= 0 and worst < best:
                q = rank_of[t]
                if q != r:
                    v = rank_load[q] + rise
                    if holds(expert_of, start, q, e):
                        v -= gain
                    if v * slowness[q] > worst:
                        worst = v * slowness[q]
                t = next_slot[t]
            t = first_slot[e]
            while t >= 0 and worst < best:
                q = rank_of[t]
                v = rank_load[q] - gain
                if holds(expert_of, start, q, f):
                    v += rise
                if v * slowness[q] > worst:
                    worst = v * slowness[q]
                t = next_slot[t]
            if worst < best:
                best = worst
                best_slot = s
                best_expert = e
    return best, best_slot, best_expert


@kernel
def refine(
    load, count, start, rank_of, rank_first, rank_last, slowness, expert_of, target, kicks, seed
):
    """Lower the busiest of the ranks [rank_first, rank_last) of one layer to `target`, as far as `kicks` allow.

    Swaps off the busiest rank alternate with re-replication (joint replicate-and-pack). Where both are stuck the search is
    kicked: a few random swaps or replacements around the busiest rank, descent, and back to the best plan if that did not help
    (iterated local search).

    Args:
        load: int64 [experts]; count: int64 [experts], updated; start: int64 [ranks + 1]; rank_of: int64 [slots];
        slowness: int64 [ranks]; expert_of: int32 [slots], updated;
        target: time (load x slowness) of the busiest rank at which to stop; kicks: number of kicks at most; seed: of the kicks.

    Returns:
        Time of the busiest rank.
    """
    slots = expert_of.size
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(start.size - 1, np.int64)
    measure(load, count, start, expert_of, share_of, rank_load)
    hot, best = busiest(rank_load, slowness, rank_first, rank_last)
    if best <= target or rank_last - rank_first < 2:
        return best
    first_slot = np.empty(load.size, np.int64)
    next_slot = np.empty(slots, np.int64)
    slot_load = np.empty(slots, np.int64)
    slot_slowness = np.empty(0, np.int64)
    if slowness[rank_first:rank_last].min() != slowness[rank_first:rank_last].max():
        slot_slowness = slowness[rank_of]
    state = np.full(1, seed, np.int64)
    best_expert_of = expert_of.copy()
    best_count = count.copy()
    low_slot = start[rank_first]
    num_slots = start[rank_last] - low_slot
    redundant = False
    for e in range(load.size):
        if count[e] > 1:
            redundant = True
            break
    max_swaps = 4 * num_slots
    tried = 0
    while True:
        while True:
            hot = descend(
                count,
                start,
                rank_of,
                rank_first,
                rank_last,
                slowness,
                slot_slowness,
                expert_of,
                share_of,
                rank_load,
                slot_load,
                target,
                max_swaps,
            )
            high = rank_load[hot] * slowness[hot]
            if high <= target or not redundant:
                break
            value, slot, expert = best_replacement(
                load,
                count,
                start,
                rank_of,
                rank_first,
                rank_last,
                slowness,
                expert_of,
                share_of,
                rank_load,
                hot,
                first_slot,
                next_slot,
            )
            if slot < 0:
                break
            replace_replica(
                load, count, start, rank_of, expert_of, share_of, rank_load, slot, expert
            )
        if high < best:
            best = high
            best_expert_of[:] = expert_of
            best_count[:] = count
        if best <= target or tried >= kicks:
            break
        if high > best:
            expert_of[:] = best_expert_of
            count[:] = best_count
            measure(load, count, start, expert_of, share_of, rank_load)
            hot, high = busiest(rank_load, slowness, rank_first, rank_last)
        tried += 1
        for _ in range(1 + next_random(state) % 3):
            width = start[hot + 1] - start[hot]
            i = start[hot] + next_random(state) % width
            j = low_slot + next_random(state) % num_slots
            a = expert_of[i]
            b = expert_of[j]
            r = rank_of[j]
            if r == hot or a == b:
                continue
            if redundant and count[b] > 1 and next_random(state) % 2 == 0:
                if not holds(expert_of, start, r, a):
                    replace_replica(
                        load, count, start, rank_of, expert_of, share_of, rank_load, j, a
                    )
                    continue
            if may_swap(i, j, hot, r, count, start, expert_of):
                exchange(expert_of, share_of, rank_load, i, j, hot, r)
    expert_of[:] = best_expert_of
    count[:] = best_count
    return best
