"""The best swap of two slots in a plan with few moves: what it gains, and what it costs in slots that have to be fetched.

Which slots hold an expert is kept in lists (`slot_lists`), now (`first_slot`, `next_slot`) and in the placement in service (`first_old`,
`next_old`). What else the search is given is explained in `coarse`.
"""

import numpy as np

from ..kernels.compiled import kernel
from .screening import (
    EVEN_BITS,
    FREE,
    FREE_BITS,
    GUESTS,
    ROOM,
    ROUNDING,
    UNEVEN_BITS,
    coarse,
    excess_removed,
    gain_uneven,
    gains,
    guest_gains,
    most_promising,
    padded,
)
from .slot_lists import has


@kernel
def _swap_rate(
    i,
    j,
    gain,
    best_rate,
    hot,
    rank_of,
    foreign,
    expert_of,
    first_slot,
    next_slot,
    first_old,
    next_old,
):
    """Excess removed per move by exchanging slots `i` (on `hot`) and `j`; -1 where that is not better or not allowed."""
    q = rank_of[j]
    a = expert_of[i]
    b = expert_of[j]
    cost = 2 - foreign[i] - foreign[j]
    cost -= has(a, q, rank_of, first_old, next_old) + has(b, hot, rank_of, first_old, next_old)
    rate = FREE * gain if cost <= 0 else gain / cost
    if (
        rate <= best_rate
        or has(a, q, rank_of, first_slot, next_slot)
        or has(b, hot, rank_of, first_slot, next_slot)
    ):
        return -1.0
    return rate


@kernel
def _try_swap(
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
):
    """`_swap_rate` of an exchange, -1 where it removes no excess."""
    q = rank_of[j]
    step = share_of[i] - share_of[j]
    slow = slowness[hot]
    gain = excess_removed(
        step, rank_load[hot] * slow - target, slow, slowness[q], target - rank_load[q] * slowness[q]
    )
    if q == hot or gain <= 0:
        return -1.0
    gain += step * slow >> ROOM
    return _swap_rate(
        i,
        j,
        gain,
        best_rate,
        hot,
        rank_of,
        foreign,
        expert_of,
        first_slot,
        next_slot,
        first_old,
        next_old,
    )


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
    bits = EVEN_BITS if even else UNEVEN_BITS
    coarse_most = coarse(most, bits)
    first = start[hot]
    width = start[hot + 1] - first
    # What may come for less first: replicas that are not at home, and slots of the ranks that this one came from.
    guests = sizes[GUESTS]
    guest_share = guest_value[0, : padded(guests)]
    guest_slack = guest_value[1, : padded(guests)]
    guest_bits = guest_value[2, : padded(guests)]
    for m in range(guests):
        guest_value[2, m] = FREE_BITS * has(expert_of[guest[m]], hot, rank_of, first_old, next_old)
    for k in range(width):
        i = first + k
        e = expert_of[i]
        top = share_of[i]
        largest[k] = 0
        # No swap gains more than the load that leaves.
        if guests == 0 or FREE * (min(most, top * slow) + (top * slow >> ROOM)) <= best_rate:
            continue
        more_bits = np.int32(
            FREE_BITS if foreign[i] or next_old[first_old[e]] >= 0 else 0
        )  # it may go home too
        if even:
            largest[k] = 2 * guest_gains(
                np.int32(top >> bits),
                coarse_most,
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
            v = gain_uneven(
                top - share_of[j], most, slow, slowness[q], target - rank_load[q] * slowness[q]
            )
            gain[k, m] = v << (guest_value[2, m] | more_bits)
            largest[k] = max(largest[k], 2 * np.int64(gain[k, m]))
    while True:
        # The replica that could do best next: seldom is there need to look at a second.
        k = most_promising(largest, width, bits, best_rate)
        if k < 0:
            break
        largest[k] = 0
        bar = np.int64(best_rate) >> bits
        for m in range(guests):
            if gain[k, m] + ROUNDING > bar:
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
                    if (
                        step > 0
                        and FREE
                        * (
                            excess_removed(step, most, slow, slowness[q], slack)
                            + (step * slow >> ROOM)
                        )
                        > best_rate
                    ):
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
        if min(fits, top * slow) + (top * slow >> ROOM) <= cost * best_rate:
            continue
        by_two_moves = 1 + foreign[i]
        if even:
            largest[k] = by_two_moves * gains(
                np.int32(top >> bits), coarse_most, shares, slacks, gain[k, low_slot:high_slot]
            )
        else:
            for j in range(low_slot, high_slot):
                q = rank_of[j]
                gain[k, j] = gain_uneven(
                    top - share_of[j], most, slow, slowness[q], target - rank_load[q] * slowness[q]
                )
                largest[k] = max(largest[k], by_two_moves * gain[k, j])
    while True:
        k = most_promising(largest, width, bits, best_rate)
        if k < 0:
            return best_rate, best_i, best_j
        largest[k] = 0
        cost = 2 - foreign[first + k]
        bar = np.int64(best_rate * cost) >> bits
        for j in range(low_slot, high_slot):
            if gain[k, j] + ROUNDING > bar:
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
