"""Take load off the busiest rank, also by changing which experts are replicated."""

import numpy as np

from ..kernels.compiled import inner_kernel
from ..kernels.layer import busiest, exchange, holds, measure, replace_replica
from ..kernels.slot_lists import list_slots, make_slot_lists
from ..kernels.state import LayerState
from .kicks import EXCHANGE, REPLACE, draw_step, next_random
from .swaps import descend


@inner_kernel
def best_replacement(state, ranks, hot, lists):
    """Find the change of one slot into another expert's replica that lowers the busiest rank most.

    Every expert of the busiest rank is tried as the one that gains a replica, every replica
    elsewhere of an expert that has several as the one that gives way.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        hot: the busiest rank.
        lists: `SlotLists`, written.

    Returns:
        (slot, expert); slot is -1 if nothing lowers it.
    """
    load, replicas, expert_of, share_of, rank_load = state
    start = ranks.start
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    first, following = lists
    list_slots(expert_of, lists)
    best = rank_load[hot] * slowness[hot]
    best_slot = -1
    best_expert = np.int64(-1)
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_new = load[e] // (replicas[e] + 1)
        gain = share_of[i] - share_new
        if (rank_load[hot] - gain) * slowness[hot] >= best:
            continue
        for s in range(expert_of.size):
            f = expert_of[s]
            if f == e or replicas[f] < 2:
                continue
            r = rank_of[s]
            if r == hot:
                continue
            rise = load[f] // (replicas[f] - 1) - share_of[s]
            # The rank of the slot.
            worst = (rank_load[r] - share_of[s] + share_new) * slowness[r]
            if worst >= best or holds(expert_of, start, r, e):
                continue
            t = first[f]
            while t >= 0 and worst < best:
                q = rank_of[t]
                if q != r:
                    v = rank_load[q] + rise
                    if holds(expert_of, start, q, e):
                        v -= gain
                    worst = max(worst, v * slowness[q])
                t = following[t]
            t = first[e]
            while t >= 0 and worst < best:
                q = rank_of[t]
                v = rank_load[q] - gain
                if holds(expert_of, start, q, f):
                    v += rise
                worst = max(worst, v * slowness[q])
                t = following[t]
            if worst < best:
                best = worst
                best_slot = s
                best_expert = e
    return best_slot, best_expert


@inner_kernel
def _descend_and_replace(state, ranks, slot_slowness, slot_load, lists, redundant, target):
    """Alternate swaps off the busiest rank with re-replication until both are stuck.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        slot_slowness: as for `descend`.
        slot_load: as for `descend`.
        lists: `SlotLists`, scratch.
        redundant: whether experts have several replicas.
        target: int64, time at which to stop.

    Returns:
        (busiest rank, time).
    """
    rank_load = state.rank_load
    while True:
        hot = descend(state, ranks, slot_slowness, slot_load, target)
        high = rank_load[hot] * ranks.slowness[hot]
        if high <= target or not redundant:
            return hot, high
        slot, expert = best_replacement(state, ranks, hot, lists)
        if slot < 0:
            return hot, high
        replace_replica(state, ranks.rank_of, slot, expert)


@inner_kernel(makes_arrays=True)
def refine(load, replicas, expert_of, ranks, target, kicks, seed):
    """Lower the busiest rank of one layer to `target`, as far as `kicks` allow.

    Swaps off the busiest rank alternate with re-replication (joint replicate-and-pack). Where both
    are stuck the search is kicked: a few random steps around the busiest rank, descent, and back to
    the best plan if that did not help (iterated local search).

    Args:
        load: int64 [experts].
        replicas: int64 [experts], updated.
        expert_of: int32 [slots], updated.
        ranks: `Ranks`.
        target: int64, time (load x slowness) of the busiest rank at which to stop.
        kicks: how many at most.
        seed: of the kicks.
    """
    rank_of = ranks.rank_of
    slowness = ranks.slowness
    slots = expert_of.size
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(slowness.size, np.int64)
    state = LayerState(load, replicas, expert_of, share_of, rank_load)
    measure(state, ranks.start)
    hot, best = busiest(rank_load, slowness)
    if best <= target or slowness.size < 2:
        return
    redundant = replicas.max() > 1
    lists = make_slot_lists(load.size, slots)
    slot_load = np.empty(slots, np.int64)
    slot_slowness = np.empty(0, np.int64)
    if slowness.min() != slowness.max():
        slot_slowness = slowness[rank_of]
    random = np.full(1, seed, np.int64)
    best_expert_of = expert_of.copy()
    best_replicas = replicas.copy()
    tried = 0
    while True:
        hot, high = _descend_and_replace(
            state, ranks, slot_slowness, slot_load, lists, redundant, target
        )
        if high < best:
            best = high
            best_expert_of[:] = expert_of
            best_replicas[:] = replicas
        if best <= target or tried >= kicks:
            break
        if high > best:
            expert_of[:] = best_expert_of
            replicas[:] = best_replicas
            measure(state, ranks.start)
            hot, high = busiest(rank_load, slowness)
        tried += 1
        for _ in range(1 + next_random(random) % 3):
            what, i, j = draw_step(state, ranks, hot, redundant, random)
            if what == REPLACE:
                replace_replica(state, rank_of, j, np.int64(expert_of[i]))
            elif what == EXCHANGE:
                exchange(state, i, j, hot, rank_of[j])
    expert_of[:] = best_expert_of
    replicas[:] = best_replicas
