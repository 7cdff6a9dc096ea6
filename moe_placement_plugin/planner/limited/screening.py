"""Look coarsely at all steps first: loads and times in 32 bits, kept from step to step.

A search looks at all steps off one rank twice: at first coarsely, in 32 bits, for which processors
have minima, eight at once; then exactly at the few that could be the best. A step changes few
ranks, so that most of what is looked at coarsely stays: it is kept in a `Screen`.
"""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.excess import excess_gained, excess_removed, over
from ..kernels.layer import share_of_replica
from ..kernels.state import Candidates, Screen

FREE = 4.0
"""What the gain of a step counts that costs nothing, since replicas go home."""
FREE_BITS = 2

ROOM = 5
"""A swap counts 1 / 2**5 of the load it moves: that leaves room on the busy rank for others."""

EVEN_BITS = 14
UNEVEN_BITS = 34
"""Coarse times leave out this many bits, for equal ranks and for ranks of different speed: 26 are
left of a layer's total, so that sums of a few, four times over, are within 32."""

ROUNDING = 32
"""A coarse rate is less than this from the exact one, in its own unit."""

NEVER = np.int64(1) << 61
"""What it costs to give up a slot that must be kept."""

_FILLER = np.int32(1 << 27)
"""Load of a guest, and price of a spare slot, that no step would take."""


@inner_kernel
def padded(size):
    """Return the next multiple of 8."""
    return (size + 7) & ~7


@inner_kernel(makes_arrays=True)
def _make_candidates(slots):
    """Return `Candidates` that are yet to be cleared."""
    return Candidates(
        np.empty(slots, np.int64),
        np.empty(slots, np.int64),
        np.empty((3, padded(slots)), np.int32),
        np.empty(1, np.int64),
    )


@inner_kernel
def _clear_candidates(candidates):
    """Take all slots off a list."""
    _, place, value, size = candidates
    place[:] = -1
    value[:] = 0
    value[0] = _FILLER
    size[0] = 0


@inner_kernel(makes_arrays=True)
def make_screen(experts, start):
    """Return a `Screen` that is yet to be cleared; start int64 [ranks + 1]."""
    ranks = start.size - 1
    slots = start[ranks]
    width = np.int64(0)
    for r in range(ranks):
        width = max(width, start[r + 1] - start[r])
    return Screen(
        np.empty(slots, np.int32),
        np.empty(slots, np.int32),
        _make_candidates(slots),
        _make_candidates(slots),
        np.empty(slots, np.int64),
        np.empty(ranks, np.int64),
        np.empty(experts, np.int64),
        np.empty(ranks, np.bool_),
        np.empty((width, slots + 8), np.int32),
        np.empty(width, np.int64),
    )


@inner_kernel
def clear_screen(screen):
    """Bring a screen to that of a layer of which no rank has been seen."""
    _clear_candidates(screen.guests)
    _clear_candidates(screen.spares)
    screen.seen_load[:] = -1
    screen.valued[:] = -1
    screen.stuck[:] = False


@inner_kernel
def _enlist(candidates, slot, wanted):
    """Bring a slot on a list if it is `wanted` there, else off it."""
    slots, place, value, size = candidates
    at = place[slot]
    if wanted and at < 0:
        slots[size[0]] = slot
        place[slot] = size[0]
        size[0] += 1
    elif not wanted and at >= 0:
        size[0] -= 1
        last = size[0]
        slots[at] = slots[last]
        place[slots[at]] = at
        place[slot] = -1
        for k in range(value.shape[0]):
            value[k, at] = value[k, last]
        value[0, last] = _FILLER
        value[2, last] = 0


@inner_kernel
def keep_lists(guests, spares, slot, foreign, replicas):
    """Bring a slot on the lists that it belongs to and off the others.

    Args:
        guests: `Candidates`, updated.
        spares: `Candidates`, updated.
        slot: which.
        foreign: 1 if its rank did not hold its expert in the placement in service, else 0.
        replicas: of its expert.
    """
    _enlist(guests, slot, foreign == 1)
    _enlist(spares, slot, replicas > 1)
    if replicas > 1:
        spares.value[2, spares.place[slot]] = FREE_BITS * foreign


@inner_kernel
def coarse(value, bits):
    """Return an int64 without its low bits, cut to what a search can add up in 32 bits."""
    return np.int32(min(value >> bits, np.int64(1) << 27))


@inner_kernel
def coarse_bits(even):
    """Return how many bits coarse times leave out."""
    return EVEN_BITS if even else UNEVEN_BITS


@inner_kernel
def _value_giving_up(state, ranks, lists, screen, limits, expert):
    """Write what the other ranks of a replicated expert gain in excess without each of its slots.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        lists: `SlotLists`.
        screen: `Screen`, updated.
        limits: `MoveLimits`.
        expert: one with several replicas.
    """
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    rank_load = state.rank_load
    following = lists.next
    give_up = screen.give_up
    place = screen.spares.place
    price = screen.spares.value
    target = limits.target
    bits = coarse_bits(limits.even)
    head = lists.first[expert]
    share = share_of_replica(state.load[expert], state.replicas[expert] - 1)
    rise = share - state.share_of[head]
    total = np.int64(0)
    t = head
    while t >= 0:
        r = rank_of[t]
        total += excess_gained(rank_load[r], rise, slowness[r], target)
        give_up[t] = -over((rank_load[r] + rise) * slowness[r], target)
        t = following[t]
    t = head
    while t >= 0:
        give_up[t] = give_up[t] + total if share <= limits.cap else NEVER
        price[0, place[t]] = coarse(give_up[t], bits)
        t = following[t]


@inner_kernel
def see_rank(state, ranks, lists, screen, limits, rank, step):
    """Write all coarse values that follow from the load of a rank which has changed.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        lists: `SlotLists`.
        screen: `Screen`, updated.
        limits: `MoveLimits`.
        rank: the rank.
        step: number of this step.
    """
    _, _, expert_of, share_of, rank_load = state
    share = screen.share
    slack = screen.slack
    valued = screen.valued
    guest_at = screen.guests.place
    guest_value = screen.guests.value
    spare_at = screen.spares.place
    spare_value = screen.spares.value
    slow = ranks.slowness[rank]
    target = limits.target
    bits = coarse_bits(limits.even)
    left = coarse(target - rank_load[rank] * slow, bits)
    for s in range(ranks.start[rank], ranks.start[rank + 1]):
        here = np.int32(share_of[s] >> EVEN_BITS)
        share[s] = here
        slack[s] = left
        at = guest_at[s]
        if at >= 0:
            guest_value[0, at] = here
            guest_value[1, at] = left
        at = spare_at[s]
        if at >= 0:
            spare_value[1, at] = coarse(target - (rank_load[rank] - share_of[s]) * slow, bits)
            e = expert_of[s]
            if valued[e] < step:
                valued[e] = step
                _value_giving_up(state, ranks, lists, screen, limits, e)


@inner_kernel
def see_changes(state, ranks, lists, screen, limits, step):
    """Write the coarse values of all ranks whose load has changed; arguments as for `see_rank`."""
    rank_load = state.rank_load
    seen_load = screen.seen_load
    for r in range(rank_load.size):
        if rank_load[r] != seen_load[r]:
            seen_load[r] = rank_load[r]
            see_rank(state, ranks, lists, screen, limits, r, step)


@inner_kernel
def _coarse_gain(step, most, slack):
    """Return the excess that a step of load removes between equal ranks, and the room it makes."""
    removed = np.int32(min(step, most) - max(np.int32(0), np.int32(step - slack)))
    return np.int32(removed + (step >> ROOM)) if removed > -4 else np.int32(0)


@inner_kernel
def gains(top, most, share, slack, gain):
    """Write the coarse gain of exchanging a replica with each slot, equal ranks.

    Args:
        top: int32, load of the replica.
        most: int32, the busy rank's excess.
        share: int32 [slots].
        slack: int32 [slots].
        gain: int32 [slots], written.

    Returns:
        The largest.
    """
    best = np.int32(0)
    for s in range(share.size):
        v = _coarse_gain(np.int32(top - share[s]), most, slack[s])
        gain[s] = v
        best = max(best, v)
    return best


@inner_kernel
def guest_gains(top, most, share, slack, bits, more_bits, gain):
    """Write as `gains` for the list of guests, each gain shifted by `bits` or `more_bits`."""
    best = np.int32(0)
    for s in range(share.size):
        v = _coarse_gain(np.int32(top - share[s]), most, slack[s])
        v = np.int32(v << np.int32(bits[s] | more_bits))
        gain[s] = v
        best = max(best, v)
    return best


@inner_kernel
def gain_uneven(step, most, slow_here, slow_there, slack):
    """Return as `gains` does, for ranks of different speed; arguments as for `excess_removed`."""
    removed = excess_removed(step, most, slow_here, slow_there, slack)
    return coarse(removed + (step * slow_here >> ROOM), UNEVEN_BITS) if removed > 0 else np.int32(0)


@inner_kernel
def replica_gains(relief, share, give_up, room, bits, gain):
    """Write the coarse excess removed by giving each spare slot to a new replica.

    Args:
        relief: int32, excess that the expert's other replicas lose.
        share: int32, load of the new replica.
        give_up: int32 [spare slots], see `Screen`.
        room: int32 [spare slots], see `Screen`.
        bits: int32 [spare slots], by which each gain is shifted.
        gain: int32 [spare slots], written.

    Returns:
        The largest.
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


@inner_kernel
def most_promising(largest, width, bits, best_rate):
    """Find the row of the largest coarse gain by two moves that could beat a rate; -1 for none.

    Args:
        largest: int64 [width], coarse gain of each row.
        width: rows.
        bits: that coarse gains leave out.
        best_rate: float64, exact.
    """
    row = -1
    best = (np.int64(2.0 * best_rate) >> bits) - 2 * ROUNDING
    for k in range(width):
        if largest[k] > 0 and largest[k] > best:
            best = largest[k]
            row = k
    return row
