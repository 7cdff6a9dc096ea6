"""Go from the old placement of a layer to a better one with few moves.

A slot moves when its rank has to fetch an expert that it did not hold. The cheapest thing that
lowers a busy rank is often not a swap (two moves) but turning one replica elsewhere into another
replica of an expert of that rank (one move, and every rank that holds the expert gets lighter).
What counts as progress is the excess: the time by which ranks are above a target, summed over
ranks. Unlike the maximum it rewards a step that helps one of several busy ranks. Which layers get
how many moves is decided over all layers, see `budget`.
"""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import busiest, busiest_free, exchange, share_of_replica, turn_slot
from ..kernels.slot_lists import has, list_slots, make_slot_lists, relist
from ..kernels.state import SlotHistory
from .new_replicas import best_new_replica, split_largest
from .screening import clear_screen, keep_lists, see_changes
from .swaps import best_swap


@inner_kernel(makes_arrays=True)
def make_history(experts, slots):
    """Return a `SlotHistory` that is yet to be begun."""
    return SlotHistory(
        make_slot_lists(experts, slots), make_slot_lists(experts, slots), np.empty(slots, np.int64)
    )


@inner_kernel
def _begin_history(history, expert_of):
    """Write the history of a placement that nothing has changed yet, int32 [slots]."""
    now, before, foreign = history
    list_slots(expert_of, now)
    list_slots(expert_of, before)
    foreign[:] = 0


@inner_kernel
def _set_shares(state, rank_of, history, screen, expert):
    """Bring the load of every replica of an expert, and of their ranks, to its count.

    These ranks have to be seen anew.

    Args:
        state: `LayerState`, updated.
        rank_of: int64 [slots].
        history: `SlotHistory`.
        screen: `Screen`, updated.
        expert: whose count has changed.
    """
    load, replicas, _, share_of, rank_load = state
    foreign = history.foreign
    following = history.now.next
    share = share_of_replica(load[expert], replicas[expert])
    s = history.now.first[expert]
    while s >= 0:
        rank_load[rank_of[s]] += share - share_of[s]
        share_of[s] = share
        screen.seen_load[rank_of[s]] = -1
        keep_lists(screen.guests, screen.spares, s, foreign[s], replicas[expert])
        s = following[s]


@inner_kernel
def _swap(state, rank_of, lists, i, j):
    """Exchange the experts of two slots, on the lists of slots as well."""
    expert_of = state.expert_of
    relist(lists, i, expert_of[i], expert_of[j])
    relist(lists, j, expert_of[j], expert_of[i])
    exchange(state, i, j, rank_of[i], rank_of[j])


@inner_kernel
def _settle_slot(state, rank_of, history, screen, slot):
    """Note that a slot has another expert; return by how much that changes the moves.

    Args:
        state: `LayerState`.
        rank_of: int64 [slots].
        history: `SlotHistory`, updated.
        screen: `Screen`, its lists are updated.
        slot: which.
    """
    foreign = history.foreign
    expert = state.expert_of[slot]
    was_foreign = foreign[slot]
    foreign[slot] = not has(expert, rank_of[slot], rank_of, history.before)
    keep_lists(screen.guests, screen.spares, slot, foreign[slot], state.replicas[expert])
    return foreign[slot] - was_foreign


@inner_kernel
def descend_moves(state, ranks, history, screen, limits, steps):
    """Lower one layer's ranks from the placement in service, by what gains most per move.

    Args:
        state: `LayerState` of the placement in service, as `measure` wrote it, updated.
        ranks: `Ranks`.
        history: `SlotHistory`, scratch.
        screen: `Screen`, scratch.
        limits: `MoveLimits`; replicas above the cap are split first, then ranks lowered to the
            target, busiest first.
        steps: `Steps`, written.

    Returns:
        Number of steps.
    """
    _, replicas, expert_of, _, rank_load = state
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    stuck = screen.stuck
    target = limits.target
    hot, high = busiest(rank_load, slowness)
    if high <= target:
        return np.int64(0)  # what is balanced is left alone
    _begin_history(history, expert_of)
    clear_screen(screen)
    for s in range(expert_of.size):
        keep_lists(screen.guests, screen.spares, s, np.int64(0), replicas[expert_of[s]])
    redundant = expert_of.size > replicas.size
    splitting = redundant
    moves = np.int64(0)
    step = np.int64(0)
    while step < steps.moves.size:
        slot = np.int64(-1)
        expert = np.int64(-1)
        i = np.int64(-1)
        j = np.int64(-1)
        if splitting:
            slot, expert = split_largest(state, ranks, history.now, screen.spares, limits)
            splitting = slot >= 0
        if not splitting:
            if hot < 0:
                break
            see_changes(state, ranks, history.now, screen, limits, step)
            rate = 0.0
            if redundant:
                rate, slot, expert = best_new_replica(
                    state, ranks, history, screen, limits, hot, rate
                )
            rate, i, j = best_swap(state, ranks, history, screen, limits, hot, rate)
        if i >= 0:
            _swap(state, rank_of, history.now, i, j)
            slot = j
            moves += _settle_slot(state, rank_of, history, screen, j)
            moves += _settle_slot(state, rank_of, history, screen, i)
            steps.expert[step, 1] = expert_of[i]
        elif slot >= 0:
            before = turn_slot(expert_of, replicas, slot, expert)
            relist(history.now, slot, before, expert_of[slot])
            moves += _settle_slot(state, rank_of, history, screen, slot)
            _set_shares(state, rank_of, history, screen, before)
            _set_shares(state, rank_of, history, screen, expert_of[slot])
        else:
            stuck[hot] = True
            hot = busiest_free(rank_load, slowness, target, stuck)
            continue
        stuck[:] = False
        hot, high = busiest(rank_load, slowness)
        steps.slot[step, 0] = slot
        steps.slot[step, 1] = i
        steps.expert[step, 0] = expert_of[slot]
        steps.moves[step] = moves
        steps.time[step] = high
        step += 1
        if high <= target:
            hot = np.int64(-1)
    return step
