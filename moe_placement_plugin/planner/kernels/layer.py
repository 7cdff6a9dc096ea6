"""Describe one layer's placement while it is searched, and the two ways to change it.

Searches count in integers: sums stay exact however many steps are made, and scans over all partners
of a replica become minima that compilers vectorise. A load is scaled so that a layer's total is
about `LOAD_SCALE`; the time of a rank is its load times an integer `slowness`, 1 for equal ranks.
"""

import numpy as np

from .compiled import inner_kernel

LOAD_SCALE = 2.0**40


@inner_kernel
def scale_load(load, total, scaled):
    """Write a load in units of which `total` makes up `LOAD_SCALE`.

    Args:
        load: float64 [experts].
        total: float64.
        scaled: int64 [experts], written.

    Returns:
        The factor, float64; 0 for no load.
    """
    factor = LOAD_SCALE / total if total > 0 else 0.0
    for e in range(load.size):
        scaled[e] = np.int64(load[e] * factor)
    return factor


@inner_kernel
def sum_of(load):
    """Return the total of float64 [experts], summed in order."""
    total = 0.0
    for e in range(load.size):
        total += load[e]
    return total


@inner_kernel
def ranks_in_use(start):
    """Count the ranks that have slots, int64 [ranks + 1]."""
    used = np.int64(0)
    for r in range(start.size - 1):
        if start[r + 1] > start[r]:
            used += 1
    return used


@inner_kernel
def sort_descending(order, value):
    """Sort indices by their values, the largest first; ties go to the lower index.

    Insertion sort: for few indices, or such as are nearly sorted.

    Args:
        order: int64, updated.
        value: float64, by index.
    """
    for k in range(1, order.size):
        e = order[k]
        i = k
        while i > 0:
            f = order[i - 1]
            if value[f] > value[e] or (value[f] == value[e] and f < e):
                break
            order[i] = f
            i -= 1
        order[i] = e


@inner_kernel
def count_replicas(expert_of, replicas):
    """Write the slots of each expert, int64 [experts]."""
    replicas[:] = 0
    for s in range(expert_of.size):
        replicas[expert_of[s]] += 1


@inner_kernel
def share_of_replica(load, replicas):
    """Return the load of one of an expert's replicas, int64."""
    # One and two, which is nearly all, without a division: 40 cycles on many processors.
    if replicas == 1:
        return load
    return load >> 1 if replicas == 2 else load // replicas


@inner_kernel
def may_swap(expert_of, replicas, start, i, j, rank_i, rank_j):
    """Decide whether two slots may exchange experts: neither rank may then hold one twice.

    Args:
        expert_of: int32 [slots].
        replicas: int64 [experts].
        start: int64 [ranks + 1].
        i: slot on `rank_i`.
        j: slot on `rank_j`, another rank.
        rank_i: rank of `i`.
        rank_j: rank of `j`.
    """
    a = expert_of[i]
    b = expert_of[j]
    return (
        a != b
        and (replicas[a] == 1 or not holds(expert_of, start, rank_j, a))
        and (replicas[b] == 1 or not holds(expert_of, start, rank_i, b))
    )


@inner_kernel
def holds(expert_of, start, rank, expert):
    """Decide whether a rank has a replica of an expert."""
    for s in range(start[rank], start[rank + 1]):
        if expert_of[s] == expert:
            return True
    return False


@inner_kernel
def busiest(rank_load, slowness):
    """Find the busiest rank: (rank, time)."""
    hot = np.int64(0)
    high = np.int64(-1)
    for r in range(rank_load.size):
        v = rank_load[r] * slowness[r]
        if v > high:
            high = v
            hot = r
    return hot, high


@inner_kernel
def busiest_free(rank_load, slowness, target, stuck):
    """Find the busiest rank above `target` that is not `stuck`, bool [ranks]; -1 for none."""
    hot = -1
    high = target
    for r in range(rank_load.size):
        v = rank_load[r] * slowness[r]
        if v > high and not stuck[r]:
            high = v
            hot = r
    return hot


@inner_kernel
def measure(state, start):
    """Write the load of every slot and rank of a `LayerState` from its replicas.

    Args:
        state: updated.
        start: int64 [ranks + 1].
    """
    load, replicas, expert_of, share_of, rank_load = state
    for r in range(start.size - 1):
        total = np.int64(0)
        for s in range(start[r], start[r + 1]):
            e = expert_of[s]
            share_of[s] = load[e] // replicas[e]
            total += share_of[s]
        rank_load[r] = total


@inner_kernel
def exchange_loads(share_of, rank_load, i, j, rank_i, rank_j):
    """Exchange what two slots of different ranks carry.

    Args:
        share_of: [slots], updated.
        rank_load: [ranks], updated.
        i: slot on `rank_i`.
        j: slot on `rank_j`.
        rank_i: rank of `i`.
        rank_j: rank of `j`.
    """
    step = share_of[i] - share_of[j]
    rank_load[rank_i] -= step
    rank_load[rank_j] += step
    v = share_of[i]
    share_of[i] = share_of[j]
    share_of[j] = v


@inner_kernel
def exchange_experts(expert_of, i, j):
    """Exchange the experts of two slots of int32 [slots]."""
    e = expert_of[i]
    expert_of[i] = expert_of[j]
    expert_of[j] = e


@inner_kernel
def exchange(state, i, j, rank_i, rank_j):
    """Exchange the experts of slots `i` and `j` of a `LayerState`, which is updated."""
    exchange_loads(state.share_of, state.rank_load, i, j, rank_i, rank_j)
    exchange_experts(state.expert_of, i, j)


@inner_kernel
def turn_slot(expert_of, replicas, slot, expert):
    """Turn a slot into one more replica of an expert.

    Args:
        expert_of: int32 [slots], updated.
        replicas: int64 [experts], updated.
        slot: held by an expert that has other replicas.
        expert: what it holds from now on.

    Returns:
        What it held.
    """
    before = expert_of[slot]
    replicas[before] -= 1
    replicas[expert] += 1
    expert_of[slot] = expert
    return before


@inner_kernel
def renew_shares(state, rank_of, a, b):
    """Bring the load of every replica of two experts, and of their ranks, to their counts.

    Args:
        state: `LayerState`, updated.
        rank_of: int64 [slots].
        a: expert.
        b: another expert.
    """
    load, replicas, expert_of, share_of, rank_load = state
    share_a = load[a] // replicas[a]
    share_b = load[b] // replicas[b]
    for s in range(expert_of.size):
        e = expert_of[s]
        if e == a or e == b:
            share = share_a if e == a else share_b
            rank_load[rank_of[s]] += share - share_of[s]
            share_of[s] = share


@inner_kernel
def replace_replica(state, rank_of, slot, expert):
    """Turn `slot` into one more replica of `expert`; see `turn_slot` and `renew_shares`."""
    before = turn_slot(state.expert_of, state.replicas, slot, expert)
    renew_shares(state, rank_of, before, expert)
