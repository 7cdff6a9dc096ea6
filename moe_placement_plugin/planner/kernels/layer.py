"""One layer's placement while it is being searched: what lies where, how heavy it is, and the two ways to change it.

Searches count in integers: sums stay exact however many steps are made, and scans over all partners of a replica become minima that
compilers vectorise (8 times faster than the same scan over float64). A load is scaled so that a layer's total is about `LOAD_SCALE`; the
time of a rank is its load times an integer `slowness`, 1 for equal ranks.
"""

import numpy as np

from .compiled import kernel

LOAD_SCALE = 2.0**40


@kernel
def scale_load(load, total, scaled):
    """Write int64 [experts]: `load`, float64 [experts], in units of which `total` makes up `LOAD_SCALE`; returns the factor, 0 for no load."""
    factor = LOAD_SCALE / total if total > 0 else 0.0
    for e in range(load.size):
        scaled[e] = np.int64(load[e] * factor)
    return factor


@kernel
def sum_of(load):
    """Total of float64 [experts], summed in order."""
    total = 0.0
    for e in range(load.size):
        total += load[e]
    return total


@kernel
def count_replicas(expert_of, count):
    """Write int64 [experts]: the slots of each expert."""
    count[:] = 0
    for s in range(expert_of.size):
        count[expert_of[s]] += 1


@kernel
def part(load, parts):
    """Load of one of `parts` replicas; one and two, which is nearly all, without a division, 40 cycles on many processors."""
    if parts == 1:
        return load
    return load >> 1 if parts == 2 else load // parts


@kernel
def over(time, target):
    """How far a time is above a target, 0 if it is not."""
    return max(np.int64(0), time - target)


@kernel
def may_swap(i, j, rank_i, rank_j, count, start, expert_of):
    """Whether slots `i` and `j` of different ranks can exchange experts without either rank holding one twice."""
    a = expert_of[i]
    b = expert_of[j]
    return (
        a != b
        and (count[a] == 1 or not holds(expert_of, start, rank_j, a))
        and (count[b] == 1 or not holds(expert_of, start, rank_i, b))
    )


@kernel
def holds(expert_of, start, rank, expert):
    """Whether `rank` has a replica of `expert`."""
    for s in range(start[rank], start[rank + 1]):
        if expert_of[s] == expert:
            return True
    return False


@kernel
def next_random(state):
    """One step of a 64-bit linear congruential generator (Knuth, MMIX); integers only, so equal on every machine."""
    state[0] = state[0] * 6364136223846793005 + 1442695040888963407
    return (state[0] >> 33) & 0x7FFFFFFF


@kernel
def busiest(rank_load, slowness, rank_first, rank_last):
    """(rank, time) of the busiest of the ranks [rank_first, rank_last)."""
    hot = rank_first
    high = np.int64(-1)
    for r in range(rank_first, rank_last):
        v = rank_load[r] * slowness[r]
        if v > high:
            high = v
            hot = r
    return hot, high


@kernel
def busiest_free(rank_load, slowness, target, stuck):
    """The busiest rank above `target` that is not `stuck`, bool [ranks]; -1 if there is none."""
    hot = -1
    high = target
    for r in range(rank_load.size):
        v = rank_load[r] * slowness[r]
        if v > high and not stuck[r]:
            high = v
            hot = r
    return hot


@kernel
def measure(load, count, start, expert_of, share_of, rank_load):
    """Write the load of every slot and rank from the counts."""
    for r in range(start.size - 1):
        total = np.int64(0)
        for s in range(start[r], start[r + 1]):
            e = expert_of[s]
            share_of[s] = load[e] // count[e]
            total += share_of[s]
        rank_load[r] = total


@kernel
def exchange(expert_of, share_of, rank_load, i, j, rank_i, rank_j):
    """Exchange the experts of slots `i` and `j`."""
    step = share_of[i] - share_of[j]
    rank_load[rank_i] -= step
    rank_load[rank_j] += step
    e = expert_of[i]
    expert_of[i] = expert_of[j]
    expert_of[j] = e
    v = share_of[i]
    share_of[i] = share_of[j]
    share_of[j] = v


@kernel
def replace_replica(load, count, start, rank_of, expert_of, share_of, rank_load, slot, expert):
    """Turn `slot` into one more replica of `expert`; the expert that held it keeps its other replicas."""
    old = expert_of[slot]
    count[old] -= 1
    count[expert] += 1
    expert_of[slot] = expert
    share_old = load[old] // count[old]
    share_new = load[expert] // count[expert]
    before = share_of[slot]
    share_of[slot] = share_new
    rank_load[rank_of[slot]] += share_new - before
    for s in range(expert_of.size):
        e = expert_of[s]
        if e == old:
            rank_load[rank_of[s]] += share_old - share_of[s]
            share_of[s] = share_old
        elif e == expert and s != slot:
            rank_load[rank_of[s]] += share_new - share_of[s]
            share_of[s] = share_new
