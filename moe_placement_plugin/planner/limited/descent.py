"""From the old placement of a layer to a better one with few moves.

A slot moves when its rank has to fetch an expert that it did not hold. The cheapest thing that lowers a busy rank is often not a swap (two
moves) but turning one replica elsewhere into another replica of an expert of that rank (one move, and every rank that holds the expert gets
lighter). What counts as progress is the excess: the time by which ranks are above a target, summed over ranks. Unlike the maximum it
rewards a step that helps one of several busy ranks. Which layers get how many moves is decided over all layers, see `moves`.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import busiest, busiest_free, exchange, part
from .new_replicas import best_new_replica, split_largest
from .screening import empty_list, keep_lists, see_rank
from .slot_lists import has, list_slots, relist
from .swaps import best_swap


@kernel
def _set_shares(
    sizes,
    guest,
    guest_at,
    guest_value,
    spare,
    spare_at,
    spare_value,
    load,
    count,
    rank_of,
    foreign,
    share_of,
    rank_load,
    seen_load,
    first_slot,
    next_slot,
    expert,
):
    """Bring the load of every replica of `expert`, and of their ranks, to its count; these ranks have to be seen anew."""
    share = part(load[expert], count[expert])
    s = first_slot[expert]
    while s >= 0:
        rank_load[rank_of[s]] += share - share_of[s]
        share_of[s] = share
        seen_load[rank_of[s]] = -1
        keep_lists(
            sizes,
            guest,
            guest_at,
            guest_value,
            spare,
            spare_at,
            spare_value,
            s,
            foreign[s],
            count[expert],
        )
        s = next_slot[s]


@kernel
def descend_moves(
    load,
    count,
    node_slots,
    start,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    target,
    cap,
    step_slot,
    step_expert,
    step_moves,
    step_time,
):
    """Lower one layer's ranks to `target` from the placement in service, busiest rank first, by what gains most per move.

    Args:
        load: int64 [experts]; count: int64 [experts], updated; start: int64 [ranks + 1]; rank_of: int64 [slots];
        node_slots: int64 [ranks, 2], first and last + 1 of the slots of the rank's node: no expert leaves its node; slowness: int64 [ranks];
        expert_of: int32 [slots], the placement in service, updated; share_of: int64 [slots], rank_load: int64 [ranks],
        as `measure` wrote them, updated; target: time.
        cap: no replica may become heavier than this by giving up others of its expert, and heavier ones are split first.
        step_slot: int64 [steps, 2], step_expert: int32 [steps, 2]: which slots each step wrote and with what, slot -1 if only one.
        step_moves: int64 [steps], moves from `old` after each step; step_time: int64 [steps], the busiest rank's time.

    Returns:
        Number of steps.
    """
    slots = expert_of.size
    ranks = start.size - 1
    hot, high = busiest(rank_load, slowness, 0, ranks)
    if high <= target:
        return 0  # what is balanced is left alone
    even = slowness.min() == slowness.max()
    width = 0
    for r in range(ranks):
        width = max(width, start[r + 1] - start[r])
    near_share = np.empty(slots, np.int32)
    near_slack = np.empty(slots, np.int32)
    sizes = np.zeros(2, np.int64)
    guest, guest_at, guest_value = empty_list(slots)
    spare, spare_at, spare_value = empty_list(slots)
    give_up = np.empty(slots, np.int64)
    seen_load = np.full(ranks, -1, np.int64)  # rank loads that the coarse values stand for
    valued = np.full(load.size, -1, np.int64)
    gain = np.empty((width, slots + 8), np.int32)
    largest = np.empty(width, np.int64)
    foreign = np.zeros(
        slots, np.int64
    )  # 1 if the slot's rank did not hold its expert in the old placement, else 0
    first_slot = np.empty(load.size, np.int64)
    next_slot = np.empty(slots, np.int64)
    first_old = np.empty(load.size, np.int64)
    next_old = np.empty(slots, np.int64)
    list_slots(expert_of, first_slot, next_slot)
    first_old[:] = first_slot
    next_old[:] = next_slot
    moves = 0
    for s in range(slots):
        if count[expert_of[s]] > 1:
            keep_lists(
                sizes,
                guest,
                guest_at,
                guest_value,
                spare,
                spare_at,
                spare_value,
                s,
                0,
                count[expert_of[s]],
            )
    stuck = np.zeros(ranks, np.bool_)
    redundant = slots > load.size
    splitting = redundant
    steps = 0
    while steps < step_moves.size:
        slot = -1
        expert = -1
        i = -1
        j = -1
        before = -1
        if splitting:
            slot, expert = split_largest(
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
            )
            splitting = slot >= 0
        if not splitting:
            if hot < 0:
                break
            low_slot = node_slots[hot, 0]
            high_slot = node_slots[hot, 1]
            for r in range(ranks):
                if rank_load[r] != seen_load[r]:
                    seen_load[r] = rank_load[r]
                    see_rank(
                        near_share,
                        near_slack,
                        guest_at,
                        guest_value,
                        spare_at,
                        spare_value,
                        give_up,
                        r,
                        steps,
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
                    )
            rate = 0.0
            if redundant:
                rate, slot, expert = best_new_replica(
                    sizes,
                    spare,
                    spare_at,
                    spare_value,
                    give_up,
                    hot,
                    low_slot,
                    high_slot,
                    target,
                    rate,
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
                )
            rate, i, j = best_swap(
                near_share,
                near_slack,
                sizes,
                guest,
                guest_value,
                hot,
                low_slot,
                high_slot,
                target,
                rate,
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
            )
        if i >= 0:
            relist(first_slot, next_slot, i, expert_of[i], expert_of[j])
            relist(first_slot, next_slot, j, expert_of[j], expert_of[i])
            exchange(expert_of, share_of, rank_load, i, j, hot, rank_of[j])
            slot = j
        elif slot >= 0:
            before = expert_of[slot]
            relist(first_slot, next_slot, slot, before, expert)
            count[before] -= 1
            count[expert] += 1
            expert_of[slot] = expert
        else:
            stuck[hot] = True
            hot = busiest_free(rank_load, slowness, target, stuck)
            continue
        step_slot[steps, 0] = slot
        step_slot[steps, 1] = i
        for side in range(2):
            s = step_slot[steps, side]
            if s >= 0:
                step_expert[steps, side] = expert_of[s]
                moves -= foreign[s]
                foreign[s] = not has(expert_of[s], rank_of[s], rank_of, first_old, next_old)
                moves += foreign[s]
                keep_lists(
                    sizes,
                    guest,
                    guest_at,
                    guest_value,
                    spare,
                    spare_at,
                    spare_value,
                    s,
                    foreign[s],
                    count[expert_of[s]],
                )
        if i < 0:
            for e in (before, expert):
                _set_shares(
                    sizes,
                    guest,
                    guest_at,
                    guest_value,
                    spare,
                    spare_at,
                    spare_value,
                    load,
                    count,
                    rank_of,
                    foreign,
                    share_of,
                    rank_load,
                    seen_load,
                    first_slot,
                    next_slot,
                    e,
                )
        stuck[:] = False
        hot, high = busiest(rank_load, slowness, 0, ranks)
        step_moves[steps] = moves
        step_time[steps] = high
        steps += 1
        if high <= target:
            hot = -1
    return steps
