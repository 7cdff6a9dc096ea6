"""Deal replicas to ranks: the heaviest to the least loaded rank that still has a slot (LPT).

All replicas of an expert are dealt at once, to different ranks, so that no rank ever holds an
expert twice.
"""

from typing import NamedTuple

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import sort_descending

_MOST_COUNTED = 256  # ranks up to which counting, quadratic in them, is the faster way to sort


class RankQueue(NamedTuple):
    """Hold the ranks that wait for replicas, the least loaded first, and scratch for sorting them.

    Attributes:
        load: float64 [ranks + 2 * slots + 2].
        rank: int64 [ranks + 2 * slots + 2].
        next_slot: int64 [ranks], the first free slot of each rank.
        sorted_load: float64 [ranks], scratch.
        sorted_rank: int64 [ranks], scratch.
        seen: int64 [ranks], scratch.
    """

    load: np.ndarray
    rank: np.ndarray
    next_slot: np.ndarray
    sorted_load: np.ndarray
    sorted_rank: np.ndarray
    seen: np.ndarray


@inner_kernel(makes_arrays=True)
def make_queue(ranks, slots):
    """Return a `RankQueue` that is yet to be written."""
    return RankQueue(
        np.empty(ranks + 2 * slots + 2, np.float64),
        np.empty(ranks + 2 * slots + 2, np.int64),
        np.empty(ranks, np.int64),
        np.empty(ranks, np.float64),
        np.empty(ranks, np.int64),
        np.empty(ranks, np.int64),
    )


@inner_kernel
def _insert(queue_load, queue_rank, front, back, load, rank):
    """Insert a rank into the ascending queue [front, back), from whichever end is nearer.

    Args:
        queue_load: float64, with room at both ends.
        queue_rank: int64, with room at both ends.
        front: where the queue begins.
        back: where it ends.
        load: of the rank.
        rank: which.

    Returns:
        The new (front, back).
    """
    if front < back and load < queue_load[(front + back) >> 1]:
        i = front - 1
        while i + 1 < back and queue_load[i + 1] <= load:
            queue_load[i] = queue_load[i + 1]
            queue_rank[i] = queue_rank[i + 1]
            i += 1
        queue_load[i] = load
        queue_rank[i] = rank
        return front - 1, back
    i = back
    while i > front and queue_load[i - 1] > load:
        queue_load[i] = queue_load[i - 1]
        queue_rank[i] = queue_rank[i - 1]
        i -= 1
    queue_load[i] = load
    queue_rank[i] = rank
    return front, back + 1


@inner_kernel
def _count_lighter(loads, load):
    """Count the loads that are below one; a loop that compilers vectorise."""
    n = 0
    for i in range(loads.size):
        n += loads[i] < load
    return n


@inner_kernel
def _merge(queue, front, back, tail):
    """Bring the entries [back, tail), as they arrived, into the ascending queue [front, back).

    Equals stay in order.

    Args:
        queue: `RankQueue`, updated.
        front: where the sorted part begins.
        back: where it ends.
        tail: where the entries behind it end.

    Returns:
        The new (front, back).
    """
    queue_load = queue.load
    queue_rank = queue.rank
    n = tail - front
    if n > _MOST_COUNTED or 4 * (tail - back) < n:
        for k in range(back, tail):
            front, back = _insert(queue_load, queue_rank, front, back, queue_load[k], queue_rank[k])
        return front, back
    # Where most of the queue has arrived anew each entry's place is counted, without a branch that
    # depends on the loads: several times faster than moving entries one by one, whose comparisons
    # no processor can foresee.
    loads = queue_load[front:tail]
    ranks = queue_rank[front:tail]
    sorted_load = queue.sorted_load
    sorted_rank = queue.sorted_rank
    seen = queue.seen
    seen[:n] = 0
    for i in range(n):
        # Equals have the same place: one after the other from there.
        place = np.uintp(_count_lighter(loads, loads[i]))
        k = place + np.uintp(seen[place])
        seen[place] += 1
        sorted_load[k] = loads[i]
        sorted_rank[k] = ranks[i]
    for i in range(n):
        loads[i] = sorted_load[i]
    for i in range(n):
        ranks[i] = sorted_rank[i]
    return front, tail


@inner_kernel
def pack_lpt(item_expert, item_load, start, state, queue):
    """Deal replicas to ranks of equal speed, each to the least loaded rank with a free slot.

    Args:
        item_expert: int64 [experts] by replica load, heaviest first.
        item_load: float64 [experts], load of one replica.
        start: int64 [ranks + 1], first slot of each rank.
        state: `LayerState` with floats; its replicas are dealt, its experts, shares and rank loads
            are written.
        queue: `RankQueue`, scratch.

    Returns:
        False if the last replicas of an expert found too few different ranks with a free slot
        (`pack_any` never fails).
    """
    replicas = state.replicas
    expert_of = state.expert_of
    share_of = state.share_of
    rank_load = state.rank_load
    queue_load = queue.load
    queue_rank = queue.rank
    next_slot = queue.next_slot
    ranks = start.size - 1
    # The ranks wait in a queue, sorted up to `back`. One that has got a replica waits unsorted
    # behind the others, for it is seldom among the next: only when it might be, after about a round
    # over all ranks, are those behind merged with the rest.
    front = expert_of.size + 1
    back = front
    for r in range(ranks):
        next_slot[r] = start[r]
        rank_load[r] = 0.0
        if start[r + 1] > start[r]:
            queue_load[back] = 0.0
            queue_rank[back] = r
            back += 1
    tail = back
    behind = np.inf  # the least load in [back, tail)
    for k in range(item_expert.size):
        e = item_expert[k]
        v = item_load[k]
        c = replicas[e]
        if tail > back and (back - front < c or queue_load[front + c - 1] > behind):
            front, back = _merge(queue, front, back, tail)
            tail = back
            behind = np.inf
        if back - front < c:
            return False
        # The c least loaded ranks leave the queue together; the last to leave comes back first.
        # Unsigned indices: signed ones are tested for counting from the end, a third of this
        # loop's time.
        for i in range(front + c - 1, front - 1, -1):
            at = np.uintp(i)
            r = np.uintp(queue_rank[at])
            w = queue_load[at] + v
            slot = np.uintp(next_slot[r])
            next_slot[r] += 1
            expert_of[slot] = e
            share_of[slot] = v
            if next_slot[r] < start[r + np.uintp(1)]:
                queue_load[np.uintp(tail)] = w
                queue_rank[np.uintp(tail)] = r
                tail += 1
                behind = min(behind, w)
            else:
                rank_load[r] = w
        front += c
    for i in range(front, tail):
        rank_load[queue_rank[i]] = queue_load[i]
    return front == tail


@inner_kernel(makes_arrays=True)
def pack_any(load, order, replicas, start, inverse_speed, expert_of):
    """Deal replicas to ranks of any speed and any number of slots; always succeeds.

    Experts with several replicas go first, each replica to the rank that would finish it earliest
    among those that have a free slot and not yet the expert; slots that no remaining expert can
    take get the hottest expert that their rank does not hold yet.

    Args:
        load: float64 [experts].
        order: int64 [experts], heaviest expert first.
        replicas: int64 [experts], updated to what was placed.
        start: int64 [ranks + 1].
        inverse_speed: float64 [ranks].
        expert_of: int32 [slots], written.
    """
    experts = load.size
    ranks = start.size - 1
    filled = np.zeros(ranks, np.int64)
    rank_load = np.zeros(ranks, np.float64)
    taken = np.zeros(ranks, np.bool_)
    expert_of[:] = -1
    # Feasibility first (several replicas first), then weight.
    share_of = np.empty(experts, np.float64)
    for e in range(experts):
        share_of[e] = load[e] / replicas[e]
    by_share = order.copy()
    sort_descending(by_share, share_of)
    placed = np.zeros(experts, np.int64)
    for several in (True, False):
        for k in range(experts):
            e = by_share[k]
            if (replicas[e] > 1) != several:
                continue
            taken[:] = False
            for _ in range(replicas[e]):
                best = -1
                best_value = np.inf
                for r in range(ranks):
                    if taken[r] or start[r] + filled[r] >= start[r + 1]:
                        continue
                    value = (rank_load[r] + share_of[e]) * inverse_speed[r]
                    if value < best_value:
                        best_value = value
                        best = r
                if best < 0:
                    break
                expert_of[start[best] + filled[best]] = e
                filled[best] += 1
                rank_load[best] += share_of[e]
                taken[best] = True
                placed[e] += 1
    replicas[:] = placed
    # An expert that found no free slot takes one of an expert that has several replicas.
    for e in range(experts):
        if replicas[e] == 0:
            best = -1
            lightest = np.inf
            for s in range(expert_of.size):
                f = expert_of[s]
                if f >= 0 and replicas[f] > 1 and load[f] / replicas[f] < lightest:
                    lightest = load[f] / replicas[f]
                    best = s
            replicas[expert_of[best]] -= 1
            expert_of[best] = e
            replicas[e] = 1
    held = np.zeros(experts, np.bool_)
    for r in range(ranks):
        if start[r] + filled[r] >= start[r + 1]:
            continue
        held[:] = False
        for s in range(start[r], start[r] + filled[r]):
            held[expert_of[s]] = True
        for s in range(start[r] + filled[r], start[r + 1]):
            best = -1
            for e in range(experts):
                if not held[e] and (
                    best < 0 or load[e] / replicas[e] > load[best] / replicas[best]
                ):
                    best = e
            if best < 0:
                # More slots on this rank than experts exist: a duplicate is unavoidable.
                best = expert_of[start[r] + (s - start[r]) % experts]
            expert_of[s] = best
            held[best] = True
            replicas[best] += 1
