"""The best slot to become a replica of another expert in a plan with few moves.

Lists of slots as in `swaps`; what else the searches are given is explained in `coarse`.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import over, part
from .screening import (
    EVEN_BITS,
    FREE,
    NEVER,
    ROUNDING,
    SPARES,
    UNEVEN_BITS,
    coarse,
    most_promising,
    padded,
    replica_gains,
)
from .slot_lists import has


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
    price = spare_value[0, : padded(spares)]
    room = spare_value[1, : padded(spares)]
    free_bits = spare_value[2, : padded(spares)]
    bits = EVEN_BITS if even else UNEVEN_BITS
    first = start[hot]
    width = start[hot + 1] - first
    for s in range(first, first + width):  # not for itself
        if spare_at[s] >= 0:
            spare_value[0, spare_at[s]] = coarse(NEVER, bits)
    for k in range(width):
        e = expert_of[first + k]
        share_new = part(load[e], count[e] + 1)
        drop = share_of[first + k] - share_new
        relief = np.int64(0)
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += over(rank_load[r] * slowness[r], target) - over(
                (rank_load[r] - drop) * slowness[r], target
            )
            t = next_slot[t]
        if even:
            largest[k] = 2 * replica_gains(
                coarse(relief, bits),
                coarse(share_new, bits),
                price,
                room,
                free_bits,
                gain[k],
            )
        else:
            largest[k] = 0
            for m in range(spares):
                here = coarse(share_new * slowness[rank_of[spare[m]]], bits)
                v = coarse(relief, bits) - spare_value[0, m] - max(0, here - spare_value[1, m])
                gain[k, m] = np.int32(v << spare_value[2, m])
                largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))
    while True:
        k = most_promising(largest, width, bits, best_rate)
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
            relief += over(rank_load[r] * slowness[r], target) - over(
                (rank_load[r] - drop) * slowness[r], target
            )
            t = next_slot[t]
        bar = np.int64(best_rate) >> bits
        for m in range(spares):
            if gain[k, m] + ROUNDING <= bar:
                continue
            s = spare[m]
            r = rank_of[s]
            # The slot's own rank may be over the target too: giving up there gains as well.
            value = (
                relief
                - give_up[s]
                - over((rank_load[r] - share_of[s] + share_new) * slowness[r], target)
            )
            if value <= 0 or r == hot or expert_of[s] == e or not low_slot <= s < high_slot:
                continue
            rate = (
                FREE * value
                if foreign[s] or has(e, r, rank_of, first_old, next_old)
                else 1.0 * value
            )
            if rate <= best_rate or has(e, r, rank_of, first_slot, next_slot):
                continue
            best_rate = rate
            best_slot = s
            best_expert = e
            bar = np.int64(best_rate) >> bits
    for s in range(first, first + width):
        if spare_at[s] >= 0:
            spare_value[0, spare_at[s]] = coarse(give_up[s], bits)
    return best_rate, best_slot, best_expert


@kernel
def split_largest(
    sizes,
    spare,
    cap,
    node_slots,
    load,
    count,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    first_slot,
    next_slot,
):
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
