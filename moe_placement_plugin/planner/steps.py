"""The steps of a plan with few moves: what each would gain, and what it costs in slots that have to be fetched.

Which slots hold an expert is kept in linked lists, now (`first_slot`, `next_slot`) and in the placement in service (`first_old`,
`next_old`): most experts have one or two replicas, so that whether a rank holds one is told by fewer looks than the rank has slots.
"""

import numpy as np

from .compiled import kernel
from .layer import over

FREE = 4.0
"""What the gain of a step counts that costs nothing, since replicas go home."""

_ROOM = 5
"""Of swaps that gain alike the one that moves more load is better: it leaves room on the busy rank for swaps to come, which is worth
1 / 2**5 of that load (5% fewer moves in all, over recordings and synthetic drift)."""


@kernel
def list_slots(expert_of, first_slot, next_slot):
    """Write the lists: first_slot int64 [experts], next_slot int64 [slots], -1 at the end."""
    first_slot[:] = -1
    for s in range(expert_of.size):
        next_slot[s] = first_slot[expert_of[s]]
        first_slot[expert_of[s]] = s


@kernel
def has(expert, rank, rank_of, first_slot, next_slot):
    """Whether `rank` has a slot on the list of `expert`."""
    s = first_slot[expert]
    while s >= 0:
        if rank_of[s] == rank:
            return True
        s = next_slot[s]
    return False


@kernel
def relist(first_slot, next_slot, slot, before, after):
    """Bring `slot` from the list of expert `before` to that of expert `after`."""
    if first_slot[before] == slot:
        first_slot[before] = next_slot[slot]
    else:
        t = first_slot[before]
        while next_slot[t] != slot:
            t = next_slot[t]
        next_slot[t] = next_slot[slot]
    next_slot[slot] = first_slot[after]
    first_slot[after] = slot


@kernel
def _gains(top, most, shares, slack, gain):
    """Write the excess removed, and the room made, by exchanging a replica of load `top` with each slot, equal ranks; returns the largest.

    Args:
        most: the busy rank's excess; shares: int64 [slots]; slack: int64 [slots], time by which each slot's rank is below the target.
    """
    best = np.int64(0)
    for s in range(shares.size):
        step = top - shares[s]
        gain[s] = min(step, most) - max(0, step - slack[s]) + (step >> _ROOM)
        best = max(best, gain[s])
    return best


@kernel
def _gains_uneven(top, most, slow_here, shares, slack, slowness, gain):
    """As `_gains` for ranks of different speed; slowness: int64 [slots]."""
    best = np.int64(0)
    for s in range(shares.size):
        step = top - shares[s]
        gain[s] = min(step * slow_here, most) - max(0, step * slowness[s] - slack[s]) + max(0, -slack[s]) + (step * slow_here >> _ROOM)
        best = max(best, gain[s])
    return best


@kernel
def _swap_rate(i, j, gain, best_rate, hot, rank_of, foreign, expert_of, first_slot, next_slot, first_old, next_old):
    """Excess removed per move by exchanging slots `i` (on `hot`) and `j`; -1 where that is not better or not allowed."""
    q = rank_of[j]
    a = expert_of[i]
    b = expert_of[j]
    cost = 2 - foreign[i] - foreign[j]
    cost -= has(a, q, rank_of, first_old, next_old) + has(b, hot, rank_of, first_old, next_old)
    rate = FREE * gain if cost <= 0 else gain / cost
    if rate <= best_rate or has(a, q, rank_of, first_slot, next_slot) or has(b, hot, rank_of, first_slot, next_slot):
        return -1.0
    return rate


@kernel
def best_swap(
    hot,
    low_slot,
    high_slot,
    target,
    best_rate,
    start,
    rank_of,
    slowness,
    slot_slowness,
    foreign,
    expert_of,
    share_of,
    rank_load,
    slack,
    gain,
    likely,
    first_slot,
    next_slot,
    first_old,
    next_old,
):
    """Best swap off rank `hot`, with slots [low_slot, high_slot), by excess removed per move.

    A swap costs two moves, one where either replica is no longer on its old rank anyway, none where such a replica goes home.

    Args:
        slot_slowness: int64 [slots], or empty if all ranks are equal; slack: see `_gains`; gain, likely: int64 [2 * slots], scratch.

    Returns:
        (rate, slot here, slot there); slots -1 if none beats `best_rate`.
    """
    best_i = -1
    best_j = -1
    slow = slowness[hot]
    most = rank_load[hot] * slow - target
    guests = 0
    for j in range(low_slot, high_slot):
        likely[guests] = j
        guests += foreign[j]
    for i in range(start[hot], start[hot + 1]):
        top = share_of[i]
        # No swap gains more than the load that leaves.
        bar = min(most, top * slow) + (top * slow >> _ROOM)
        if FREE * bar <= best_rate:
            continue
        # What may come for less first: replicas that are not at home, and slots of the ranks that this one came from.
        size = guests
        if foreign[i]:
            t = first_old[expert_of[i]]
            while t >= 0:
                q = rank_of[t]
                if low_slot <= t < high_slot and size + start[q + 1] - start[q] <= likely.size:
                    for j in range(start[q], start[q + 1]):
                        likely[size] = j
                        size += 1
                t = next_old[t]
        for k in range(size):
            j = likely[k]
            q = rank_of[j]
            step = top - share_of[j]
            v = min(step * slow, most) - over(step * slowness[q], slack[j]) + max(np.int64(0), -slack[j])
            if v <= 0 or q == hot:
                continue
            v += step * slow >> _ROOM
            if FREE * v > best_rate:
                rate = _swap_rate(i, j, v, best_rate, hot, rank_of, foreign, expert_of, first_slot, next_slot, first_old, next_old)
                if rate > best_rate:
                    best_rate = rate
                    best_i = i
                    best_j = j
        cost = 2 - foreign[i]
        if bar <= cost * best_rate:
            continue
        if slot_slowness.size:
            largest = _gains_uneven(top, most, slow, share_of[low_slot:high_slot], slack[low_slot:high_slot], slot_slowness[low_slot:high_slot], gain)
        else:
            largest = _gains(top, most, share_of[low_slot:high_slot], slack[low_slot:high_slot], gain)
        if largest <= cost * best_rate:
            continue
        for k in range(high_slot - low_slot):
            j = low_slot + k
            if gain[k] > cost * best_rate and rank_of[j] != hot and gain[k] > (top - share_of[j]) * slow >> _ROOM:
                rate = _swap_rate(i, j, gain[k], best_rate, hot, rank_of, foreign, expert_of, first_slot, next_slot, first_old, next_old)
                if rate > best_rate:
                    best_rate = rate
                    best_i = i
                    best_j = j
    return best_rate, best_i, best_j


@kernel
def best_new_replica(
    hot,
    low_slot,
    high_slot,
    target,
    cap,
    best_rate,
    load,
    count,
    start,
    rank_of,
    slowness,
    foreign,
    expert_of,
    share_of,
    rank_load,
    first_slot,
    next_slot,
    first_old,
    next_old,
    spare,
    give_up,
):
    """Best change of one of the slots [low_slot, high_slot) into a replica of an expert of rank `hot`, by excess removed per move.

    Args:
        cap: no replica may become heavier by giving up others of its expert.
        spare, give_up: int64 [slots], scratch.

    Returns:
        (rate, slot, expert); slot -1 if none beats `best_rate`.
    """
    best_slot = -1
    best_expert = -1
    # The slots that may change, and what it costs the other replicas of an expert that one of its slots is given up.
    spares = 0
    least = np.int64(1 << 62)
    for head in range(low_slot, high_slot):
        f = expert_of[head]
        if count[f] < 2 or first_slot[f] != head:
            continue
        share = load[f] // (count[f] - 1)
        if share > cap:
            continue
        rise = share - share_of[head]
        total = np.int64(0)
        first = spares
        t = head
        while t >= 0:
            r = rank_of[t]
            risen = over((rank_load[r] + rise) * slowness[r], target)
            total += risen - over(rank_load[r] * slowness[r], target)
            if r != hot:
                spare[spares] = t
                give_up[spares] = -risen
                spares += 1
            t = next_slot[t]
        for k in range(first, spares):
            give_up[k] += total
            least = min(least, give_up[k])
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_new = load[e] // (count[e] + 1)
        drop = share_of[i] - share_new
        relief = np.int64(0)
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += over(rank_load[r] * slowness[r], target) - over((rank_load[r] - drop) * slowness[r], target)
            t = next_slot[t]
        if relief - least <= best_rate:
            continue
        for k in range(spares):
            # The slot's own rank may be over the target too: giving up there gains as well.
            gain = relief - give_up[k]
            s = spare[k]
            if gain <= best_rate and foreign[s] == 0:
                continue
            r = rank_of[s]
            gain -= over((rank_load[r] - share_of[s] + share_new) * slowness[r], target)
            if gain <= 0 or FREE * gain <= best_rate or expert_of[s] == e:
                continue
            rate = FREE * gain if foreign[s] or has(e, r, rank_of, first_old, next_old) else 1.0 * gain
            if rate <= best_rate or has(e, r, rank_of, first_slot, next_slot):
                continue
            best_rate = rate
            best_slot = s
            best_expert = e
    return best_rate, best_slot, best_expert


@kernel
def split_largest(cap, node_slots, load, count, rank_of, slowness, expert_of, share_of, rank_load, first_slot, next_slot):
    """The best slot to turn into a replica of the expert with the largest replica: (slot, expert), slot -1 if none is above `cap`.

    Args:
        node_slots: int64 [ranks, 2], first and last + 1 of the slots of the rank's node: the new replica stays on the expert's.
    """
    largest = np.int64(0)
    for s in range(share_of.size):
        largest = max(largest, share_of[s])
    if largest <= cap:
        return -1, -1
    at = 0
    while share_of[at] < largest:
        at += 1
    e = expert_of[at]
    share_new = load[e] // (count[e] + 1)
    best = np.int64(1 << 62)
    best_slot = -1
    for head in range(node_slots[rank_of[at], 0], node_slots[rank_of[at], 1]):
        f = expert_of[head]
        if f == e or count[f] < 2 or first_slot[f] != head:
            continue
        share = load[f] // (count[f] - 1)
        if share > cap:
            continue
        rise = share - share_of[head]
        # The two busiest of the expert's ranks when it gives up a slot: the busiest other than the slot's own is one of them.
        first = np.int64(-1)
        second = np.int64(-1)
        t = head
        while t >= 0:
            v = (rank_load[rank_of[t]] + rise) * slowness[rank_of[t]]
            if v > first:
                second = first
                first = v
            elif v > second:
                second = v
            t = next_slot[t]
        t = head
        while t >= 0:
            r = rank_of[t]
            others = second if (rank_load[r] + rise) * slowness[r] == first else first
            worst = max(others, (rank_load[r] - share_of[t] + share_new) * slowness[r])
            if worst < best and not has(e, r, rank_of, first_slot, next_slot):
                best = worst
                best_slot = t
            t = next_slot[t]
    return best_slot, e
