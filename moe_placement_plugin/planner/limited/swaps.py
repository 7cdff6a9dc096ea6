"""Find the best swap of two slots in a plan with few moves.

A swap costs two slots that have to be fetched, one where either replica is no longer on its old
rank anyway, none where such a replica goes home.
"""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.excess import excess_removed
from ..kernels.slot_lists import has
from .screening import (
    FREE,
    FREE_BITS,
    ROOM,
    ROUNDING,
    coarse,
    coarse_bits,
    gain_uneven,
    gains,
    guest_gains,
    most_promising,
    padded,
)


@inner_kernel
def _try_swap(state, ranks, history, target, i, j, best_rate):
    """Return the excess removed per move by exchanging two slots.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        history: `SlotHistory`.
        target: int64, time.
        i: slot on a rank above the target.
        j: slot elsewhere.
        best_rate: float64, rate that the exchange has to beat.

    Returns:
        The rate, float64; -1 where it is not better, or not allowed.
    """
    _, _, expert_of, share_of, rank_load = state
    now, before, foreign = history
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    hot = rank_of[i]
    q = rank_of[j]
    step = share_of[i] - share_of[j]
    slow = slowness[hot]
    gain = excess_removed(
        step, rank_load[hot] * slow - target, slow, slowness[q], target - rank_load[q] * slowness[q]
    )
    if q == hot or gain <= 0:
        return -1.0
    gain += step * slow >> ROOM
    a = expert_of[i]
    b = expert_of[j]
    cost = 2 - foreign[i] - foreign[j]
    cost -= has(a, q, rank_of, before) + has(b, hot, rank_of, before)
    rate = FREE * gain if cost <= 0 else gain / cost
    if rate <= best_rate or has(a, q, rank_of, now) or has(b, hot, rank_of, now):
        return -1.0
    return rate


@inner_kernel(inlined=True)
def _screen_guests(state, ranks, history, screen, limits, hot, best_rate):
    """Write the coarse gain of exchanging each replica of the busy rank with each guest elsewhere.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        history: `SlotHistory`.
        screen: `Screen`; `gain` and `largest` are written, by replica of the rank.
        limits: `MoveLimits`.
        hot: the busy rank.
        best_rate: float64, rate that is to be beaten.
    """
    _, _, expert_of, share_of, rank_load = state
    _, before, foreign = history
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    guest, _, guest_value, size = screen.guests
    gain = screen.gain
    largest = screen.largest
    target = limits.target
    bits = coarse_bits(limits.even)
    slow = slowness[hot]
    most = rank_load[hot] * slow - target
    guests = size[0]
    guest_share = guest_value[0, : padded(guests)]
    guest_slack = guest_value[1, : padded(guests)]
    guest_bits = guest_value[2, : padded(guests)]
    for m in range(guests):
        guest_bits[m] = FREE_BITS * has(expert_of[guest[m]], hot, rank_of, before)
    first = ranks.start[hot]
    for k in range(ranks.start[hot + 1] - first):
        top = share_of[first + k]
        largest[k] = 0
        # No swap gains more than the load that leaves.
        if guests == 0 or FREE * (min(most, top * slow) + (top * slow >> ROOM)) <= best_rate:
            continue
        # It may go home too.
        homes = foreign[first + k] or before.next[before.first[expert_of[first + k]]] >= 0
        more_bits = np.int32(FREE_BITS if homes else 0)
        if limits.even:
            largest[k] = 2 * guest_gains(
                np.int32(top >> bits),
                coarse(most, bits),
                guest_share,
                guest_slack,
                guest_bits,
                more_bits,
                gain[k],
            )
            continue
        for m in range(guests):
            j = guest[m]
            q = rank_of[j]
            slack = target - rank_load[q] * slowness[q]
            v = gain_uneven(top - share_of[j], most, slow, slowness[q], slack)
            gain[k, m] = v << (guest_bits[m] | more_bits)
            largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))


@inner_kernel(inlined=True)
def _swap_with_guest(state, ranks, history, screen, limits, hot, best_rate):
    """Find the best swap with a replica that is not at home; arguments as for `best_swap`."""
    start = ranks.start
    guest = screen.guests.slots
    gain = screen.gain
    bits = coarse_bits(limits.even)
    low_slot = limits.node_slots[hot, 0]
    high_slot = limits.node_slots[hot, 1]
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    _screen_guests(state, ranks, history, screen, limits, hot, best_rate)
    while True:
        # The replica that could do best next: seldom is there need to look at a second.
        k = most_promising(screen.largest, start[hot + 1] - start[hot], bits, best_rate)
        if k < 0:
            return best_rate, best_i, best_j
        screen.largest[k] = 0
        i = start[hot] + k
        bar = np.int64(best_rate) >> bits
        for m in range(screen.guests.size[0]):
            if gain[k, m] + ROUNDING > bar:
                j = guest[m]
                if low_slot <= j < high_slot:
                    rate = _try_swap(state, ranks, history, limits.target, i, j, best_rate)
                    if rate > best_rate:
                        best_rate = rate
                        best_i = i
                        best_j = j
                        bar = np.int64(best_rate) >> bits


@inner_kernel(inlined=True)
def _swap_home(state, ranks, history, limits, hot, best_rate):
    """Find the best swap that brings a replica back to its rank; arguments as for `best_swap`."""
    _, _, expert_of, share_of, rank_load = state
    _, before, foreign = history
    start = ranks.start
    slowness = ranks.slowness
    target = limits.target
    low_slot = limits.node_slots[hot, 0]
    high_slot = limits.node_slots[hot, 1]
    slow = slowness[hot]
    most = rank_load[hot] * slow - target
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    for i in range(start[hot], start[hot + 1]):
        if not foreign[i]:
            continue
        t = before.first[expert_of[i]]
        while t >= 0:
            q = ranks.rank_of[t]
            slack = target - rank_load[q] * slowness[q]
            if low_slot <= t < high_slot and (slack > 0 or not limits.even):
                for j in range(start[q], start[q + 1]):
                    step = share_of[i] - share_of[j]
                    if step <= 0:
                        continue
                    gain = excess_removed(step, most, slow, slowness[q], slack)
                    if FREE * (gain + (step * slow >> ROOM)) > best_rate:
                        rate = _try_swap(state, ranks, history, target, i, j, best_rate)
                        if rate > best_rate:
                            best_rate = rate
                            best_i = i
                            best_j = j
            t = before.next[t]
    return best_rate, best_i, best_j


@inner_kernel(inlined=True)
def _screen_all(state, ranks, foreign, screen, limits, hot, best_rate):
    """Write the coarse gain of exchanging each replica of the busy rank with each slot.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        foreign: int64 [slots], see `SlotHistory`.
        screen: `Screen`; `gain` and `largest` are written, by replica of the rank.
        limits: `MoveLimits`.
        hot: the busy rank.
        best_rate: float64, rate that is to be beaten.
    """
    _, _, _, share_of, rank_load = state
    start, rank_of, _, _, _, slowness = ranks
    gain = screen.gain
    largest = screen.largest
    target = limits.target
    even = limits.even
    bits = coarse_bits(even)
    low_slot = limits.node_slots[hot, 0]
    high_slot = limits.node_slots[hot, 1]
    slow = slowness[hot]
    most = rank_load[hot] * slow - target
    # No swap between equal ranks gains more than fits below the target where the load goes.
    fits = most
    if even:
        lightest = rank_load[rank_of[low_slot]]
        for r in range(rank_of[low_slot], rank_of[high_slot - 1] + 1):
            if start[r + 1] > start[r]:
                lightest = min(lightest, rank_load[r])
        fits = min(most, target - lightest)
    shares = screen.share[low_slot:high_slot]
    slacks = screen.slack[low_slot:high_slot]
    first = start[hot]
    for k in range(start[hot + 1] - first):
        top = share_of[first + k]
        away = foreign[first + k]
        largest[k] = 0
        if min(fits, top * slow) + (top * slow >> ROOM) <= (2 - away) * best_rate:
            continue
        by_two_moves = 1 + away
        if even:
            largest[k] = by_two_moves * gains(
                np.int32(top >> bits),
                coarse(most, bits),
                shares,
                slacks,
                gain[k, low_slot:high_slot],
            )
            continue
        for j in range(low_slot, high_slot):
            q = rank_of[j]
            slack = target - rank_load[q] * slowness[q]
            gain[k, j] = gain_uneven(top - share_of[j], most, slow, slowness[q], slack)
            largest[k] = max(largest[k], by_two_moves * gain[k, j])


@inner_kernel(inlined=True)
def _swap_with_any(state, ranks, history, screen, limits, hot, best_rate):
    """Find the best swap with any slot; arguments as for `best_swap`."""
    start = ranks.start
    foreign = history.foreign
    gain = screen.gain
    bits = coarse_bits(limits.even)
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    _screen_all(state, ranks, foreign, screen, limits, hot, best_rate)
    while True:
        k = most_promising(screen.largest, start[hot + 1] - start[hot], bits, best_rate)
        if k < 0:
            return best_rate, best_i, best_j
        screen.largest[k] = 0
        i = start[hot] + k
        cost = 2 - foreign[i]
        bar = np.int64(best_rate * cost) >> bits
        for j in range(limits.node_slots[hot, 0], limits.node_slots[hot, 1]):
            if gain[k, j] + ROUNDING > bar:
                rate = _try_swap(state, ranks, history, limits.target, i, j, best_rate)
                if rate > best_rate:
                    best_rate = rate
                    best_i = i
                    best_j = j
                    bar = np.int64(best_rate * cost) >> bits


@inner_kernel
def best_swap(state, ranks, history, screen, limits, hot, best_rate):
    """Find the best swap off a rank, by excess removed per move.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        history: `SlotHistory`.
        screen: `Screen`, up to date.
        limits: `MoveLimits`.
        hot: the rank.
        best_rate: float64, rate that the swap has to beat.

    Returns:
        (rate, slot here, slot there); slots -1 if none beats `best_rate`.
    """
    # What may come for less first: replicas that are not at home, and slots of the ranks that those
    # of this one came from.
    rate, best_i, best_j = _swap_with_guest(state, ranks, history, screen, limits, hot, best_rate)
    rate, i, j = _swap_home(state, ranks, history, limits, hot, rate)
    if i >= 0:
        best_i, best_j = i, j
    rate, i, j = _swap_with_any(state, ranks, history, screen, limits, hot, rate)
    if i >= 0:
        best_i, best_j = i, j
    return rate, best_i, best_j
