"""Value and make the steps of a search for several windows at once."""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import (
    busiest,
    exchange_experts,
    exchange_loads,
    holds,
    may_swap,
    measure,
    renew_shares,
    turn_slot,
)
from ..kernels.state import LayerState


@inner_kernel
def _spread_rank_loads(state, rank_of):
    """Write the load of every slot's rank, in every window."""
    slot_load = state.slot_load
    rank_load = state.rank_load
    for w in range(slot_load.shape[0]):
        for s in range(slot_load.shape[1]):
            slot_load[w, s] = rank_load[w, rank_of[s]]


@inner_kernel
def measure_windows(state, ranks):
    """Write all loads of a `WindowsState` from its replicas; return the sum of busiest times."""
    load, replicas, expert_of, share_of, rank_load, _ = state
    total = np.int64(0)
    for w in range(load.shape[0]):
        window = LayerState(load[w], replicas, expert_of, share_of[w], rank_load[w])
        measure(window, ranks.start)
        total += busiest(window.rank_load, ranks.slowness)[1]
    _spread_rank_loads(state, ranks.rank_of)
    return total


@inner_kernel
def _two_busiest_others(rank_load, slowness, rank):
    """Find the two busiest ranks of one window other than `rank`.

    Returns:
        (rank of the busiest, its time, time of the next); rank -1 where no other has load.
    """
    first_rank = -1
    first = np.int64(0)
    second = np.int64(0)
    for r in range(rank_load.size):
        if r == rank:
            continue
        v = rank_load[r] * slowness[r]
        if v > first:
            second = first
            first = v
            first_rank = r
        elif v > second:
            second = v
    return first_rank, first, second


@inner_kernel
def _add_times(cost, i, share, slot_load, slot_slowness, others):
    """Add one window's busiest time after the exchange of slot `i` with each slot.

    Args:
        cost: int64 [slots], updated.
        i: slot.
        share: int64 [slots].
        slot_load: int64 [slots].
        slot_slowness: int64 [slots].
        others: int64 [slots], time of the busiest rank that neither slot is on.
    """
    top = share[i]
    load_here = slot_load[i]
    slow_here = slot_slowness[i]
    for j in range(cost.size):
        step = top - share[j]
        a = max((load_here - step) * slow_here, (slot_load[j] + step) * slot_slowness[j])
        cost[j] += max(a, others[j])


@inner_kernel
def _lowest(cost):
    """Return the least of int64 [slots]; a loop that compilers vectorise."""
    best = np.int64(1 << 62)
    for j in range(cost.size):
        best = min(best, cost[j])
    return best


@inner_kernel
def best_swap(state, ranks, rank, best, slot_slowness, others, cost):
    """Find the best exchange of any replica on a rank.

    Args:
        state: `WindowsState`.
        ranks: `Ranks`.
        rank: the rank.
        best: int64, sum of busiest times that the exchange has to beat.
        slot_slowness: int64 [slots], slowness of each slot's rank.
        others: int64 [windows, slots], scratch.
        cost: int64 [slots], scratch.

    Returns:
        (sum of busiest times, slot here, slot there), -1 if none is below `best`.
    """
    _, replicas, expert_of, share_of, rank_load, slot_load = state
    start = ranks.start
    rank_of = ranks.rank_of
    windows, slots = share_of.shape
    best_i = -1
    best_j = -1
    for w in range(windows):
        first_rank, first, second = _two_busiest_others(rank_load[w], ranks.slowness, rank)
        row = others[w]
        for j in range(slots):
            row[j] = first
        if first_rank >= 0:
            for j in range(start[first_rank], start[first_rank + 1]):
                row[j] = second
    for i in range(start[rank], start[rank + 1]):
        cost[:] = 0
        for w in range(windows):
            _add_times(cost, i, share_of[w], slot_load[w], slot_slowness, others[w])
        for j in range(start[rank], start[rank + 1]):
            cost[j] = 1 << 61
        if _lowest(cost) >= best:
            continue
        for j in range(slots):
            if cost[j] < best and may_swap(expert_of, replicas, start, i, j, rank, rank_of[j]):
                best = cost[j]
                best_i = i
                best_j = j
    return best, best_i, best_j


@inner_kernel
def swap(state, ranks, i, j):
    """Exchange the experts of two slots of different ranks, in every window."""
    _, _, expert_of, share_of, rank_load, slot_load = state
    start = ranks.start
    a = ranks.rank_of[i]
    b = ranks.rank_of[j]
    for w in range(share_of.shape[0]):
        exchange_loads(share_of[w], rank_load[w], i, j, a, b)
        for s in range(start[a], start[a + 1]):
            slot_load[w, s] = rank_load[w, a]
        for s in range(start[b], start[b + 1]):
            slot_load[w, s] = rank_load[w, b]
    exchange_experts(expert_of, i, j)


@inner_kernel
def replace(state, ranks, slot, expert):
    """Turn `slot` into one more replica of `expert`, in every window."""
    load, replicas, expert_of, share_of, rank_load, _ = state
    before = turn_slot(expert_of, replicas, slot, expert)
    for w in range(load.shape[0]):
        window = LayerState(load[w], replicas, expert_of, share_of[w], rank_load[w])
        renew_shares(window, ranks.rank_of, before, expert)
    _spread_rank_loads(state, ranks.rank_of)


@inner_kernel
def _time_replaced(state, ranks, slot, expert, best, change):
    """Return the sum of busiest times after `slot` became a replica of `expert`.

    Args:
        state: `WindowsState`.
        ranks: `Ranks`.
        slot: held by an expert that has other replicas.
        expert: another one.
        best: int64, sum from which on it does not matter.
        change: int64 [ranks], scratch.
    """
    load, replicas, expert_of, share_of, rank_load, _ = state
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    e = expert
    f = expert_of[slot]
    total = np.int64(0)
    for w in range(load.shape[0]):
        share_e = load[w, e] // (replicas[e] + 1)
        share_f = load[w, f] // (replicas[f] - 1)
        for q in range(change.size):
            change[q] = rank_load[w, q]
        for t in range(expert_of.size):
            if expert_of[t] == e:
                change[rank_of[t]] += share_e - share_of[w, t]
            elif expert_of[t] == f:
                change[rank_of[t]] += share_f - share_of[w, t]
        change[rank_of[slot]] += share_e - share_f
        worst = np.int64(0)
        for q in range(change.size):
            worst = max(worst, change[q] * slowness[q])
        total += worst
        if total >= best:
            break
    return total


@inner_kernel(makes_arrays=True)
def best_replacement(state, ranks, best, change):
    """Find the best change of one slot into another replica of an expert of a busiest rank.

    Args:
        state: `WindowsState`.
        ranks: `Ranks`.
        best: int64, sum of busiest times that the change has to beat.
        change: int64 [ranks], scratch.

    Returns:
        (sum, slot, expert), slot -1 if none is below `best`.
    """
    load, replicas, expert_of, _, rank_load, _ = state
    start = ranks.start
    rank_of = ranks.rank_of
    best_slot = -1
    best_expert = np.int64(-1)
    tried = np.zeros(load.shape[1], np.bool_)
    for w in range(load.shape[0]):
        hot = busiest(rank_load[w], ranks.slowness)[0]
        for i in range(start[hot], start[hot + 1]):
            e = expert_of[i]
            if tried[e]:
                continue
            tried[e] = True
            for s in range(expert_of.size):
                f = expert_of[s]
                r = rank_of[s]
                if f == e or replicas[f] < 2 or r == hot or holds(expert_of, start, r, e):
                    continue
                total = _time_replaced(state, ranks, s, e, best, change)
                if total < best:
                    best = total
                    best_slot = s
                    best_expert = e
    return best, best_slot, best_expert
