"""Find the best slot to become a replica of another expert in a plan with few moves."""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.excess import excess_relieved, over
from ..kernels.layer import share_of_replica
from ..kernels.slot_lists import has
from .screening import (
    FREE,
    NEVER,
    ROUNDING,
    coarse,
    coarse_bits,
    most_promising,
    padded,
    replica_gains,
)


@inner_kernel
def _screen_replicas(state, ranks, lists, screen, limits, hot):
    """Write the coarse gain of each replica of the busy rank in each spare slot.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        lists: `SlotLists`.
        screen: `Screen`; `gain` and `largest` are written, by replica of the rank.
        limits: `MoveLimits`.
        hot: the busy rank.
    """
    load, replicas, expert_of, share_of, rank_load = state
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    spare, _, spare_value, size = screen.spares
    gain = screen.gain
    largest = screen.largest
    target = limits.target
    even = limits.even
    bits = coarse_bits(even)
    spares = size[0]
    price = spare_value[0, : padded(spares)]
    room = spare_value[1, : padded(spares)]
    free_bits = spare_value[2, : padded(spares)]
    first = ranks.start[hot]
    for k in range(ranks.start[hot + 1] - first):
        e = expert_of[first + k]
        share_new = share_of_replica(load[e], replicas[e] + 1)
        drop = share_of[first + k] - share_new
        relief = excess_relieved(e, drop, lists, rank_of, rank_load, slowness, target)
        if even:
            largest[k] = 2 * replica_gains(
                coarse(relief, bits), coarse(share_new, bits), price, room, free_bits, gain[k]
            )
            continue
        largest[k] = 0
        for m in range(spares):
            here = coarse(share_new * slowness[rank_of[spare[m]]], bits)
            v = coarse(relief, bits) - price[m] - max(0, here - room[m])
            gain[k, m] = np.int32(v << free_bits[m])
            largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))


@inner_kernel
def _set_prices(spares, start, rank, give_up, forbidden, bits):
    """Write the coarse price of a rank's spare slots.

    Args:
        spares: `Candidates`, updated.
        start: int64 [ranks + 1].
        rank: which.
        give_up: int64 [slots], the prices.
        forbidden: whether to write one that nobody pays.
        bits: that coarse values leave out.
    """
    place = spares.place
    value = spares.value
    for s in range(start[rank], start[rank + 1]):
        if place[s] >= 0:
            value[0, place[s]] = coarse(NEVER if forbidden else give_up[s], bits)


@inner_kernel
def best_new_replica(state, ranks, history, screen, limits, hot, best_rate):
    """Find the best change of a slot into a replica of an expert of a rank, by excess per move.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        history: `SlotHistory`.
        screen: `Screen`, up to date.
        limits: `MoveLimits`.
        hot: the rank.
        best_rate: float64, rate that the change has to beat.

    Returns:
        (rate, slot, expert); slot -1 if none beats `best_rate`.
    """
    load, replicas, expert_of, share_of, rank_load = state
    now, before, foreign = history
    start = ranks.start
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    give_up = screen.give_up
    spare = screen.spares.slots
    gain = screen.gain
    largest = screen.largest
    target = limits.target
    bits = coarse_bits(limits.even)
    low_slot = limits.node_slots[hot, 0]
    high_slot = limits.node_slots[hot, 1]
    first = start[hot]
    width = start[hot + 1] - first
    best_slot = -1
    best_expert = np.int64(-1)
    _set_prices(screen.spares, start, hot, give_up, True, bits)  # not for itself
    _screen_replicas(state, ranks, now, screen, limits, hot)
    _set_prices(screen.spares, start, hot, give_up, False, bits)
    while True:
        k = most_promising(largest, width, bits, best_rate)
        if k < 0:
            return best_rate, best_slot, best_expert
        largest[k] = 0
        e = expert_of[first + k]
        share_new = share_of_replica(load[e], replicas[e] + 1)
        drop = share_of[first + k] - share_new
        relief = excess_relieved(e, drop, now, rank_of, rank_load, slowness, target)
        bar = np.int64(best_rate) >> bits
        for m in range(screen.spares.size[0]):
            if gain[k, m] + ROUNDING <= bar:
                continue
            s = spare[m]
            r = rank_of[s]
            # The slot's own rank may be over the target too: giving up there gains as well.
            there = (rank_load[r] - share_of[s] + share_new) * slowness[r]
            value = relief - give_up[s] - over(there, target)
            if value <= 0 or r == hot or expert_of[s] == e or not low_slot <= s < high_slot:
                continue
            free = foreign[s] or has(e, r, rank_of, before)
            rate = FREE * value if free else 1.0 * value
            if rate <= best_rate or has(e, r, rank_of, now):
                continue
            best_rate = rate
            best_slot = s
            best_expert = e
            bar = np.int64(best_rate) >> bits


@inner_kernel
def split_largest(state, ranks, lists, spares, limits):
    """Find the best slot to turn into a replica of the expert with the largest replica.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        lists: `SlotLists`.
        spares: `Candidates`.
        limits: `MoveLimits`; the new replica stays on the expert's node.

    Returns:
        (slot, expert), slot -1 if no replica is above the cap.
    """
    load, replicas, expert_of, share_of, rank_load = state
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    following = lists.next
    cap = limits.cap
    largest = np.int64(0)
    for s in range(share_of.size):
        largest = max(largest, share_of[s])
    if largest <= cap:
        return -1, np.int64(-1)
    at = 0
    while share_of[at] < largest:
        at += 1
    e = expert_of[at]
    share_new = share_of_replica(load[e], replicas[e] + 1)
    best = np.int64(1 << 62)
    best_slot = -1
    low_slot = limits.node_slots[rank_of[at], 0]
    high_slot = limits.node_slots[rank_of[at], 1]
    for k in range(spares.size[0]):
        head = spares.slots[k]
        f = expert_of[head]
        if f == e or lists.first[f] != head or not low_slot <= head < high_slot:
            continue
        share = share_of_replica(load[f], replicas[f] - 1)
        if share > cap:
            continue
        rise = share - share_of[head]
        # The two busiest of the expert's ranks when it gives up a slot: the busiest other than the
        # slot's own is one of them.
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
            t = following[t]
        t = head
        while t >= 0:
            r = rank_of[t]
            others = second if (rank_load[r] + rise) * slowness[r] == first else first
            worst = max(others, (rank_load[r] - share_of[t] + share_new) * slowness[r])
            if worst < best and not has(e, r, rank_of, lists):
                best = worst
                best_slot = t
            t = following[t]
    return best_slot, np.int64(e)
