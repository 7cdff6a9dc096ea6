"""What a search for the best step looks at first: loads and times in 32 bits, kept from step to step.

A search looks at all steps off one rank twice: at first coarsely, in 32 bits, for which processors have minima, eight at once; then
exactly at the few that could be the best. A step changes few ranks, so that most of what is looked at coarsely stays:

- near_share, near_slack: int32 [slots], load of the slot's replica, and time by which its rank is below the target (equal ranks only).
- guest: int64 [slots], the slots whose expert the rank did not hold in the placement in service, in any order; guest_at: int64 [slots],
  where on that list each slot is, or -1; guest_value: int32 [3, slots], by position: share, slack, and how many bits a gain is shifted
  for steps that cost nothing.
- spare, spare_at, spare_value: the same for the slots of replicated experts, the only ones that may be given up; values are the excess
  that the expert's other ranks gain by that, the time for which the rank has room in its place, and bits as above. give_up: int64
  [slots], the first of these in full.
- sizes: int64 [2], of the two lists. Behind the end of a list are values of which no gain can come, so that loops over it may run on to
  a multiple of 8, all in vector code.

They are single arrays: numba counts references to the arrays of a tuple in every loop that uses them.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import over, part

FREE = 4.0
"""What the gain of a step counts that costs nothing, since replicas go home."""
FREE_BITS = 2

ROOM = 5
"""Of swaps that gain alike the one that moves more load is better: it leaves room on the busy rank for swaps to come, which is worth
1 / 2**5 of that load (5% fewer moves in all, over recordings and synthetic drift)."""

EVEN_BITS = 14
UNEVEN_BITS = 34
"""Coarse times leave out this many bits, for equal ranks and for ranks of different speed: 26 are left of a layer's total, so that sums
of a few, four times over, are within 32."""

ROUNDING = 32
"""A coarse rate is less than this from the exact one, in its own unit."""

NEVER = np.int64(1) << 61
"""What it costs to give up a slot that must be kept."""

_FILLER = np.int32(1 << 27)
"""Load of a guest, and price of a spare slot, that no step would take."""

GUESTS = 0
SPARES = 1


@kernel
def padded(size):
    return (size + 7) & ~7


@kernel
def empty_list(slots):
    """(list, place, value) of an empty list of slots: see above."""
    value = np.zeros((3, padded(slots)), np.int32)
    value[0] = _FILLER
    return np.empty(slots, np.int64), np.full(slots, -1, np.int64), value


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
def keep_lists(
    sizes, guest, guest_at, guest_value, spare, spare_at, spare_value, slot, foreign, count
):
    """Bring `slot` on the lists that it belongs to and off the others.

    Args:
        foreign: 1 if its rank did not hold its expert in the placement in service, else 0; count: replicas of its expert.
    """
    _enlist(guest, guest_at, guest_value, sizes, GUESTS, slot, foreign == 1)
    _enlist(spare, spare_at, spare_value, sizes, SPARES, slot, count > 1)
    if count > 1:
        spare_value[2, spare_at[slot]] = FREE_BITS * foreign


@kernel
def coarse(value, bits):
    """An int64 without its low bits, cut to what a search can add up in 32 bits."""
    return np.int32(min(value >> bits, np.int64(1) << 27))


@kernel
def _value_giving_up(
    spare_at,
    spare_value,
    give_up,
    expert,
    target,
    cap,
    bits,
    load,
    count,
    rank_of,
    slowness,
    share_of,
    rank_load,
    first_slot,
    next_slot,
):
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
        give_up[t] = give_up[t] + total if share <= cap else NEVER
        spare_value[0, spare_at[t]] = coarse(give_up[t], bits)
        t = next_slot[t]


@kernel
def see_rank(
    near_share,
    near_slack,
    guest_at,
    guest_value,
    spare_at,
    spare_value,
    give_up,
    rank,
    step,
    valued,
    even,
    target,
    cap,
    load,
    count,
    start,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    first_slot,
    next_slot,
):
    """Write all coarse values that follow from the load of a rank which has changed.

    Args:
        step: number of this step; valued: int64 [experts], the step before which `give_up` was last written, updated.
    """
    bits = EVEN_BITS if even else UNEVEN_BITS
    left = coarse(target - rank_load[rank] * slowness[rank], bits)
    for s in range(start[rank], start[rank + 1]):
        here = np.int32(share_of[s] >> EVEN_BITS)
        near_share[s] = here
        near_slack[s] = left
        at = guest_at[s]
        if at >= 0:
            guest_value[0, at] = here
            guest_value[1, at] = left
        at = spare_at[s]
        if at >= 0:
            spare_value[1, at] = coarse(
                target - (rank_load[rank] - share_of[s]) * slowness[rank], bits
            )
            e = expert_of[s]
            if valued[e] < step:
                valued[e] = step
                _value_giving_up(
                    spare_at,
                    spare_value,
                    give_up,
                    e,
                    target,
                    cap,
                    bits,
                    load,
                    count,
                    rank_of,
                    slowness,
                    share_of,
                    rank_load,
                    first_slot,
                    next_slot,
                )


@kernel
def gains(top, most, share, slack, gain):
    """Write the excess removed, and the room made, by exchanging a replica of load `top` with each slot, equal ranks; returns the largest.

    Args:
        top, most: int32, `most` the busy rank's excess; share, slack, gain: int32 [slots].
    """
    best = np.int32(0)
    for s in range(share.size):
        step = np.int32(top - share[s])
        removed = np.int32(min(step, most) - max(np.int32(0), np.int32(step - slack[s])))
        v = np.int32(removed + (step >> ROOM)) if removed > -4 else np.int32(0)
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def guest_gains(top, most, share, slack, bits, more_bits, gain):
    """As `gains` for the list of guests, each gain shifted by `bits` or `more_bits`."""
    best = np.int32(0)
    for s in range(share.size):
        step = np.int32(top - share[s])
        removed = np.int32(min(step, most) - max(np.int32(0), np.int32(step - slack[s])))
        v = np.int32(removed + (step >> ROOM)) if removed > -4 else np.int32(0)
        v = np.int32(v << np.int32(bits[s] | more_bits))
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def excess_removed(step, most, slow_here, slow_there, slack):
    """By taking load `step` from a rank with excess `most` to one that is `slack` below the target."""
    return min(step * slow_here, most) - over(step * slow_there, slack) + max(np.int64(0), -slack)


@kernel
def gain_uneven(step, most, slow_here, slow_there, slack):
    """As in `gains`, for ranks of different speed."""
    removed = excess_removed(step, most, slow_here, slow_there, slack)
    return coarse(removed + (step * slow_here >> ROOM), UNEVEN_BITS) if removed > 0 else np.int32(0)


@kernel
def replica_gains(relief, share, give_up, room, bits, gain):
    """Write the excess removed by giving each spare slot to a new replica of load `share`, shifted by `bits`; returns the largest.

    Args:
        relief: int32, excess that the expert's other replicas lose; give_up, room, bits, gain: int32 [spare slots].
    """
    best = np.int32(0)
    for s in range(give_up.size):
        v = np.int32(
            np.int32(np.int32(relief - give_up[s]) - max(np.int32(0), np.int32(share - room[s])))
            << bits[s]
        )
        gain[s] = v
        best = max(best, v)
    return best


@kernel
def most_promising(largest, width, bits, best_rate):
    """Row of the largest of `largest`, int64 [width], coarse gains by two moves, that could beat `best_rate`; else -1."""
    row = -1
    best = (np.int64(2.0 * best_rate) >> bits) - 2 * ROUNDING
    for k in range(width):
        if largest[k] > 0 and largest[k] > best:
            best = largest[k]
            row = k
    return row
