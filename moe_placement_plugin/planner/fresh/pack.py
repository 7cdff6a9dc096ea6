"""Which rank each replica goes to at first: heaviest replica to the least loaded rank that still has a slot (LPT).

All replicas of an expert are dealt at once, to different ranks, so that no rank ever holds an expert twice.
"""

import numpy as np

from ..kernels.compiled import kernel

_MOST_COUNTED = 256  # ranks up to which counting, quadratic in them, is the faster way to sort


@kernel
def _insert(queue_load, queue_rank, front, back, load, rank):
    """Insert (load, rank) into the ascending queue [front, back), from whichever end is nearer; there is room at both ends.

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


@kernel
def _lighter(loads, load):
    """How many of `loads` are below `load`; a loop that compilers vectorise."""
    n = 0
    for i in range(loads.size):
        n += loads[i] < load
    return n


@kernel
def _merge(queue_load, queue_rank, front, back, tail, sorted_load, sorted_rank, seen):
    """Bring the entries [back, tail), in the order in which they arrived, into the ascending queue [front, back); equals stay in order.

    Where most of the queue has arrived anew each entry's place is counted, without a branch that depends on the loads: several times
    faster than moving entries one by one, whose comparisons no processor can foresee.

    Args:
        sorted_load, sorted_rank, seen: scratch of [ranks].

    Returns:
        The new (front, back).
    """
    n = tail - front
    if n > _MOST_COUNTED or 4 * (tail - back) < n:
        for k in range(back, tail):
            front, back = _insert(queue_load, queue_rank, front, back, queue_load[k], queue_rank[k])
        return front, back
    loads = queue_load[front:tail]
    ranks = queue_rank[front:tail]
    seen[:n] = 0
    for i in range(n):
        place = np.uintp(_lighter(loads, loads[i]))
        k = place + np.uintp(
            seen[place]
        )  # equals have the same place: one after the other from there
        seen[place] += 1
        sorted_load[k] = loads[i]
        sorted_rank[k] = ranks[i]
    for i in range(n):
        loads[i] = sorted_load[i]
    for i in range(n):
        ranks[i] = sorted_rank[i]
    return front, tail


@kernel
def pack_lpt(
    item_expert,
    item_load,
    count,
    start,
    expert_of,
    share_of,
    rank_load,
    queue_load,
    queue_rank,
    next_slot,
    sorted_load,
    sorted_rank,
    seen,
):
    """Deal replicas to ranks of equal speed, heaviest first, each to the least loaded rank with a free slot.

    The ranks wait in a queue, sorted up to `back`. One that has got a replica waits unsorted behind the others, for it is seldom among
    the next: only when it might be, after about a round over all ranks, are those behind merged with the rest.

    Args:
        item_expert: int64 [experts] by replica load, heaviest first; item_load: float64 [experts], load of one replica.
        count: int64 [experts], replicas of each expert.
        start: int64 [ranks + 1], first slot of each rank.
        expert_of: int32 [slots], share_of: float64 [slots], rank_load: float64 [ranks], written.
        queue_load, queue_rank: scratch of [ranks + 2 * slots + 2]. next_slot, sorted_load, sorted_rank, seen: scratch of [ranks].

    Returns:
        False if the last replicas of an expert found too few different ranks with a free slot (`pack_any` never fails).
    """
    ranks = start.size - 1
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
        c = count[e]
        if tail > back and (back - front < c or queue_load[front + c - 1] > behind):
            front, back = _merge(
                queue_load, queue_rank, front, back, tail, sorted_load, sorted_rank, seen
            )
            tail = back
            behind = np.inf
        if back - front < c:
            return False
        # The c least loaded ranks leave the queue together; the last to leave comes back first.
        # Unsigned indices: signed ones are tested for counting from the end, a third of this loop's time.
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


@kernel
def pack_any(load, count, start, inverse_speed, expert_of):
    """Deal replicas to ranks of any speed and any number of slots. Always succeeds; may change `count` where it must.

    Experts with the most replicas go first, each replica to the rank that would finish it earliest among those with the most
    pressing free slots; slots that no remaining expert can take get the hottest expert that their rank does not hold yet.

    Args:
        load: float64 [experts]; count: int64 [experts], updated to what was placed; start: int64 [ranks + 1];
        inverse_speed: float64 [ranks]; expert_of: int32 [slots], written.
    """
    experts = load.size
    ranks = start.size - 1
    filled = np.zeros(ranks, np.int64)
    rank_load = np.zeros(ranks, np.float64)
    taken = np.zeros(ranks, np.bool_)
    expert_of[:] = -1
    # Feasibility first (many replicas first), then weight.
    order = np.argsort(-load / count, kind="mergesort")
    order = order[np.argsort(-np.minimum(count[order], 2), kind="mergesort")]
    placed = np.zeros(experts, np.int64)
    for k in range(experts):
        e = order[k]
        share = load[e] / count[e]
        taken[:] = False
        for _ in range(count[e]):
            best = -1
            best_value = np.inf
            for r in range(ranks):
                if taken[r] or start[r] + filled[r] >= start[r + 1]:
                    continue
                value = (rank_load[r] + share) * inverse_speed[r]
                if value < best_value:
                    best_value = value
                    best = r
            if best < 0:
                break
            expert_of[start[best] + filled[best]] = e
            filled[best] += 1
            rank_load[best] += share
            taken[best] = True
            placed[e] += 1
    count[:] = placed
    # An expert that found no free slot takes one of an expert that has several replicas.
    for e in range(experts):
        if count[e] == 0:
            best = -1
            lightest = np.inf
            for s in range(expert_of.size):
                f = expert_of[s]
                if f >= 0 and count[f] > 1 and load[f] / count[f] < lightest:
                    lightest = load[f] / count[f]
                    best = s
            count[expert_of[best]] -= 1
            expert_of[best] = e
            count[e] = 1
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
                if not held[e] and (best < 0 or load[e] / count[e] > load[best] / count[best]):
                    best = e
            if best < 0:  # more slots on this rank than experts exist: a duplicate is unavoidable
                best = expert_of[start[r] + (s - start[r]) % experts]
            expert_of[s] = best
            held[best] = True
            count[best] += 1
