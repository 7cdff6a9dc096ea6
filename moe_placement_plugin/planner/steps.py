"""The steps of a plan with few moves: what each would gain, and what it costs in slots that have to be fetched.

Which slots hold an expert is kept in linked lists, now (`first_slot`, `next_slot`) and in the placement in service (`first_old`,
`next_old`): most experts have one or two replicas, so that whether a rank holds one is told by fewer looks than the rank has slots.

A search looks at all steps off one rank twice: at first coarsely, in 32 bits, for which processors have minima, eight at once; then
exactly at the few that could be the best. What it looks at coarsely is kept from step to step, for a step changes few ranks:

- near_share, near_slack: int32 [slots], load of the slot's replica, and time by which its rank is below the target (equal ranks only).
- guest: int64 [slots], the slots whose expert the rank did not hold in the placement in service, in any order; guest_at: int64 [slots],
  where on that list each slot is, or -1; guest_value: int32 [3, slots], by position: share, slack, and how many bits a gain is shifted
  for steps that cost nothing.
- spare, spare_at, spare_value: the same for the slots of replicated experts, the only ones that may be given up; values are the excess
  that the expert's other ranks gain by that, the time for which the rank has room in its place, and bits as above. give_up: int64
  [slots], the first of these in full.
- sizes: int64 [2], of the two lists. Behind the end of a list are values of which no gain can come, so that loops over it may run on to
  a multiple of 8, all in vector code.

int32 values are loads or times without their low bits.
"""

import numpy as np

from .compiled import kernel
from .layer import over, part

FREE = 4.0
"""What the gain of a step counts that costs nothing, since replicas go home."""
_FREE_BITS = 2

_ROOM = 5
"""Of swaps that gain alike the one that moves more load is better: it leaves room on the busy rank for swaps to come, which is worth
1 / 2**5 of that load (5% fewer moves in all, over recordings and synthetic drift)."""

_EVEN_BITS = 14
_UNEVEN_BITS = 34
"""Coarse times leave out this many bits, for equal ranks and for ranks of different speed: 26 are left of a layer's total, so that sums
of a few, four times over, are within 32."""

_ROUNDING = 32
"""A coarse rate is less than this from the exact one, in its own unit."""

_NEVER = np.int64(1) << 61
"""What it costs to give up a slot that must be kept."""

_FILLER = np.int32(1 << 27)
"""Load of a guest, and price of a spare slot, that no step would take."""

GUESTS = 0
SPARES = 1


@kernel
def _padded(size):
    return (size + 7) & ~7


@kernel
def empty_list(slots):
    """(list, place, value) of an empty list of slots: see above."""
    value = np.zeros((3, _padded(slots)), np.int32)
    value[0] = _FILLER
    return np.empty(slots, np.int64), np.full(slots, -1, np.int64), value


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
def _enlist(listed, place, value, sizes, which, slot, wanted):
    """Bring `slot` on one of the lists if it is `wanted` there, else off it."""
    at = place[slot]
    if wanted and at < 0:
        listed[sizes[which]] = slot
        place[slot] = sizes[which]
        sizes[which] += 1
    elif not wanted and at >= 0:
        sizes[which] -= 1
        last = sizes[which]
        listed[at] = listed[last]
        place[listed[at]] = at
        place[slot] = -1
        for k in range(value.shape[0]):
            value[k, at] = value[k, last]
        value[0, last] = _FILLER
        value[2, last] = 0


@kernel
def keep_lists(sizes, guest, guest_at, guest_value, spare, spare_at, spare_value, slot, foreign, count):
    """Bring `slot` on the lists that it belongs to and off the others.

    Args:
        foreign: 1 if its rank did not hold its expert in the placement in service, else 0; count: replicas of its expert.
    """
    _enlist(guest, guest_at, guest_value, sizes, GUESTS, slot, foreign == 1)
    _enlist(spare, spare_at, spare_value, sizes, SPARES, slot, count > 1)
    if count > 1:
        spare_value[2, spare_at[slot]] = _FREE_BITS * foreign


@kernel
def _coarse(value, bits):
    """An int64 without its low bits, cut to what a search can add up in 32 bits."""
    return np.int32(min(value >> bits, np.int64(1) << 27))


@kernel
def _value_giving_up(spare_at, spare_value, give_up, expert, target, cap, bits, load, count, rank_of, slowness, share_of, rank_load, first_slot, next_slot):
    """Write what the other replicas' ranks gain in excess when a slot of a replicated expert is given up, for each of its slots.

    Args:
        cap: no replica may become heavier than this by that.
    """
    head = first_slot[expert]
    share = part(load[expert], count[expert] - 1)
    rise = share - share_of[head]
    total = np.int64(0)
    t = head
    while t >= 0:
        r = rank_of[t]
        risen = over((rank_load[r] + rise) * slowness[r], target)
        total += risen - over(rank_load[r] * slowness[r], target)
        give_up[t] = -risen
        t = next_slot[t]
    t = head
    while t >= 0:
        give_up[t] = give_up[t] + total if share <= cap else _NEVER
        spare_value[0, spare_at[t]] = _coarse(give_up[t], bits)
        t = next_slot[t]


@kernel
def see_rank(
    near_share, near_slack, guest_at, guest_value, spare_at, spare_value, give_up, rank, step, valued, even, target, cap, load, count, start, rank_of, slowness, expert_of, share_of, rank_load, first_slot, next_slot
):
    """Write all coarse values that follow from the load of a rank which has changed.

    Args:
        step: number of this step; valued: int64 [experts], the step before which `give_up` was last written, updated.
    """
    bits = _EVEN_BITS if even else _UNEVEN_BITS
    left = _coarse(target - rank_load[rank] * slowness[rank], bits)
    for s in range(start[rank], start[rank + 1]):
        here = np.int32(share_of[s] >> _EVEN_BITS)
        near_share[s] = here
        near_slack[s] = left
        at = guest_at[s]
        if at >= 0:
            guest_value[0, at] = here
            guest_value[1, at] = left
        at = spare_at[s]
        if at >= 0:
            spare_value[1, at] = _coarse(target - (rank_load[rank] - share_of[s]) * slowness[rank], bits)
            e = expert_of[s]
            if valued[e] < step:
                valued[e] = step
                _value_giving_up(spare_at, spare_value, give_up, e, target, cap, bits, load, count, rank_of, slowness, share_of, rank_load, first_slot, next_slot)


@kernel
def _gains(top, most, share, slack, gain):
    """Write the excess removed, and the room made, by exchanging a replica of load `top` with each slot, equal ranks; returns the largest.

    Args:
        top, most: int32, `most` the busy rank's excess; share, slack, gain: int32 [slots].
    """
    best = np.int32(0)
    for s in range(share.size):
        step = np.int32(top - share[s])
        removed = np.int32(min(step, most) - max(np.int32(0), np.int32(step - slack[s])))
        v = np.int32(removed + (step >> _ROOM)) if removed > -4 else np.int32(0)
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def _guest_gains(top, most, share, slack, bits, more_bits, gain):
    """As `_gains` for the list of guests, each gain shifted by `bits` or `more_bits`."""
    best = np.int32(0)
    for s in range(share.size):
        step = np.int32(top - share[s])
        removed = np.int32(min(step, most) - max(np.int32(0), np.int32(step - slack[s])))
        v = np.int32(removed + (step >> _ROOM)) if removed > -4 else np.int32(0)
        v = np.int32(v << np.int32(bits[s] | more_bits))
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def _excess_removed(step, most, slow_here, slow_there, slack):
    """By taking load `step` from a rank with excess `most` to one that is `slack` below the target."""
    return min(step * slow_here, most) - over(step * slow_there, slack) + max(np.int64(0), -slack)


@kernel
def _gain_uneven(step, most, slow_here, slow_there, slack):
    """As in `_gains`, for ranks of different speed."""
    removed = _excess_removed(step, most, slow_here, slow_there, slack)
    return _coarse(removed + (step * slow_here >> _ROOM), _UNEVEN_BITS) if removed > 0 else np.int32(0)


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
def _try_swap(
    i, j, best_rate, target, hot, rank_of, slowness, foreign, expert_of, share_of, rank_load, first_slot, next_slot, first_old, next_old
):
    """`_swap_rate` of an exchange, -1 where it removes no excess."""
    q = rank_of[j]
    step = share_of[i] - share_of[j]
    slow = slowness[hot]
    gain = _excess_removed(step, rank_load[hot] * slow - target, slow, slowness[q], target - rank_load[q] * slowness[q])
    if q == hot or gain <= 0:
        return -1.0
    gain += step * slow >> _ROOM
    return _swap_rate(i, j, gain, best_rate, hot, rank_of, foreign, expert_of, first_slot, next_slot, first_old, next_old)


@kernel
def _most_promising(largest, width, bits, best_rate):
    """Row of the largest of `largest`, int64 [width], coarse gains by two moves, that could beat `best_rate`; else -1."""
    row = -1
    best = (np.int64(2.0 * best_rate) >> bits) - 2 * _ROUNDING
    for k in range(width):
        if largest[k] > 0 and largest[k] > best:
            best = largest[k]
            row = k
    return row


@kernel
def best_swap(
    near_share,
    near_slack,
    sizes,
    guest,
    guest_value,
    hot,
    low_slot,
    high_slot,
    target,
    best_rate,
    even,
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
    gain,
    largest,
):
    """Best swap off rank `hot`, with slots [low_slot, high_slot), by excess removed per move.

    A swap costs two moves, one where either replica is no longer on its old rank anyway, none where such a replica goes home.

    Args:
        even: all ranks are equal; gain: int32 [most slots of a rank, slots and some], largest: int64 [most slots of a rank], scratch.

    Returns:
        (rate, slot here, slot there); slots -1 if none beats `best_rate`.
    """
    best_i = -1
    best_j = -1
    slow = slowness[hot]
    most = rank_load[hot] * slow - target
    bits = _EVEN_BITS if even else _UNEVEN_BITS
    coarse_most = _coarse(most, bits)
    first = start[hot]
    width = start[hot + 1] - first
    # What may come for less first: replicas that are not at home, and slots of the ranks that this one came from.
    guests = sizes[GUESTS]
    guest_share = guest_value[0, : _padded(guests)]
    guest_slack = guest_value[1, : _padded(guests)]
    guest_bits = guest_value[2, : _padded(guests)]
    for m in range(guests):
        guest_value[2, m] = _FREE_BITS * has(expert_of[guest[m]], hot, rank_of, first_old, next_old)
    for k in range(width):
        i = first + k
        e = expert_of[i]
        top = share_of[i]
        largest[k] = 0
        # No swap gains more than the load that leaves.
        if guests == 0 or FREE * (min(most, top * slow) + (top * slow >> _ROOM)) <= best_rate:
            continue
        more_bits = np.int32(_FREE_BITS if foreign[i] or next_old[first_old[e]] >= 0 else 0)  # it may go home too
        if even:
            largest[k] = 2 * _guest_gains(
                np.int32(top >> bits), coarse_most, guest_share, guest_slack, guest_bits, more_bits, gain[k]
            )
            continue
        for m in range(guests):
            j = guest[m]
            q = rank_of[j]
            v = _gain_uneven(top - share_of[j], most, slow, slowness[q], target - rank_load[q] * slowness[q])
            gain[k, m] = v << (guest_value[2, m] | more_bits)
            largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))
    while True:
        # The replica that could do best next: seldom is there need to look at a second.
        k = _most_promising(largest, width, bits, best_rate)
        if k < 0:
            break
        largest[k] = 0
        bar = np.int64(best_rate) >> bits
        for m in range(guests):
            if gain[k, m] + _ROUNDING > bar:
                j = guest[m]
                if low_slot <= j < high_slot:
                    rate = _try_swap(
                        first + k,
                        j,
                        best_rate,
                        target,
                        hot,
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
                    )
                    if rate > best_rate:
                        best_rate = rate
                        best_i = first + k
                        best_j = j
                        bar = np.int64(best_rate) >> bits
    for i in range(first, first + width):
        if not foreign[i]:
            continue
        t = first_old[expert_of[i]]
        while t >= 0:
            q = rank_of[t]
            slack = target - rank_load[q] * slowness[q]
            if low_slot <= t < high_slot and (slack > 0 or not even):
                for j in range(start[q], start[q + 1]):
                    step = share_of[i] - share_of[j]
                    if step > 0 and FREE * (_excess_removed(step, most, slow, slowness[q], slack) + (step * slow >> _ROOM)) > best_rate:
                        rate = _try_swap(
                            i,
                            j,
                            best_rate,
                            target,
                            hot,
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
                        )
                        if rate > best_rate:
                            best_rate = rate
                            best_i = i
                            best_j = j
            t = next_old[t]
    # All others. No swap between equal ranks gains more than fits below the target where the load goes.
    fits = most
    if even:
        lightest = rank_load[rank_of[low_slot]]
        for r in range(rank_of[low_slot], rank_of[high_slot - 1] + 1):
            if start[r + 1] > start[r]:
                lightest = min(lightest, rank_load[r])
        fits = min(most, target - lightest)
    shares = near_share[low_slot:high_slot]
    slacks = near_slack[low_slot:high_slot]
    for k in range(width):
        i = first + k
        top = share_of[i]
        cost = 2 - foreign[i]
        largest[k] = 0
        if min(fits, top * slow) + (top * slow >> _ROOM) <= cost * best_rate:
            continue
        by_two_moves = 1 + foreign[i]
        if even:
            largest[k] = by_two_moves * _gains(
                np.int32(top >> bits), coarse_most, shares, slacks, gain[k, low_slot:high_slot]
            )
        else:
            for j in range(low_slot, high_slot):
                q = rank_of[j]
                gain[k, j] = _gain_uneven(top - share_of[j], most, slow, slowness[q], target - rank_load[q] * slowness[q])
                largest[k] = max(largest[k], by_two_moves * gain[k, j])
    while True:
        k = _most_promising(largest, width, bits, best_rate)
        if k < 0:
            return best_rate, best_i, best_j
        largest[k] = 0
        cost = 2 - foreign[first + k]
        bar = np.int64(best_rate * cost) >> bits
        for j in range(low_slot, high_slot):
            if gain[k, j] + _ROUNDING > bar:
                rate = _try_swap(
                    first + k,
                    j,
                    best_rate,
                    target,
                    hot,
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
                )
                if rate > best_rate:
                    best_rate = rate
                    best_i = first + k
                    best_j = j
                    bar = np.int64(best_rate * cost) >> bits


@kernel
def _replica_gains(relief, share, give_up, room, bits, gain):
    """Write the excess removed by giving each spare slot to a new replica of load `share`, shifted by `bits`; returns the largest.

    Args:
        relief: int32, excess that the expert's other replicas lose; give_up, room, bits, gain: int32 [spare slots].
    """
    best = np.int32(0)
    for s in range(give_up.size):
        v = np.int32(np.int32(np.int32(relief - give_up[s]) - max(np.int32(0), np.int32(share - room[s]))) << bits[s])
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def best_new_replica(
    sizes,
    spare,
    spare_at,
    spare_value,
    give_up,
    hot,
    low_slot,
    high_slot,
    target,
    best_rate,
    even,
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
    gain,
    largest,
):
    """Best change of one of the slots [low_slot, high_slot) into a replica of an expert of rank `hot`, by excess removed per move.

    Args:
        even, gain, largest: as for `best_swap`.

    Returns:
        (rate, slot, expert); slot -1 if none beats `best_rate`.
    """
    best_slot = -1
    best_expert = -1
    spares = sizes[SPARES]
    price = spare_value[0, : _padded(spares)]
    room = spare_value[1, : _padded(spares)]
    free_bits = spare_value[2, : _padded(spares)]
    bits = _EVEN_BITS if even else _UNEVEN_BITS
    first = start[hot]
    width = start[hot + 1] - first
    for s in range(first, first + width):  # not for itself
        if spare_at[s] >= 0:
            spare_value[0, spare_at[s]] = _coarse(_NEVER, bits)
    for k in range(width):
        e = expert_of[first + k]
        share_new = part(load[e], count[e] + 1)
        drop = share_of[first + k] - share_new
        relief = np.int64(0)
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += over(rank_load[r] * slowness[r], target) - over((rank_load[r] - drop) * slowness[r], target)
            t = next_slot[t]
        if even:
            largest[k] = 2 * _replica_gains(
                _coarse(relief, bits),
                _coarse(share_new, bits),
                price,
                room,
                free_bits,
                gain[k],
            )
        else:
            largest[k] = 0
            for m in range(spares):
                here = _coarse(share_new * slowness[rank_of[spare[m]]], bits)
                v = _coarse(relief, bits) - spare_value[0, m] - max(0, here - spare_value[1, m])
                gain[k, m] = np.int32(v << spare_value[2, m])
                largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))
    while True:
        k = _most_promising(largest, width, bits, best_rate)
        if k < 0:
            break
        largest[k] = 0
        e = expert_of[first + k]
        share_new = part(load[e], count[e] + 1)
        drop = share_of[first + k] - share_new
        relief = np.int64(0)
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += over(rank_load[r] * slowness[r], target) - over((rank_load[r] - drop) * slowness[r], target)
            t = next_slot[t]
        bar = np.int64(best_rate) >> bits
        for m in range(spares):
            if gain[k, m] + _ROUNDING <= bar:
                continue
            s = spare[m]
            r = rank_of[s]
            # The slot's own rank may be over the target too: giving up there gains as well.
            value = relief - give_up[s] - over((rank_load[r] - share_of[s] + share_new) * slowness[r], target)
            if value <= 0 or r == hot or expert_of[s] == e or not low_slot <= s < high_slot:
                continue
            rate = FREE * value if foreign[s] or has(e, r, rank_of, first_old, next_old) else 1.0 * value
            if rate <= best_rate or has(e, r, rank_of, first_slot, next_slot):
                continue
            best_rate = rate
            best_slot = s
            best_expert = e
            bar = np.int64(best_rate) >> bits
    for s in range(first, first + width):
        if spare_at[s] >= 0:
            spare_value[0, spare_at[s]] = _coarse(give_up[s], bits)
    return best_rate, best_slot, best_expert


@kernel
def split_largest(sizes, spare, cap, node_slots, load, count, rank_of, slowness, expert_of, share_of, rank_load, first_slot, next_slot):
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
    share_new = part(load[e], count[e] + 1)
    best = np.int64(1 << 62)
    best_slot = -1
    low_slot = node_slots[rank_of[at], 0]
    high_slot = node_slots[rank_of[at], 1]
    for k in range(sizes[SPARES]):
        head = spare[k]
        f = expert_of[head]
        if f == e or first_slot[f] != head or not low_slot <= head < high_slot:
            continue
        share = part(load[f], count[f] - 1)
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
