"""Let load leave its home node, at a price: the soft form of keeping groups on nodes.

Starting from the hierarchical plan, ranks are brought below a target time by the exchanges and
re-replications that let least load leave for the excess they remove. Run for a ladder of targets
this gives the curve of load leaving its home node against balance.
"""

import numpy as np

from ..kernels.compiled import inner_kernel, kernel
from ..kernels.excess import excess_gained, excess_relieved, excess_removed, over
from ..kernels.layer import (
    LOAD_SCALE,
    busiest_free,
    count_replicas,
    exchange,
    holds,
    may_swap,
    measure,
    replace_replica,
    scale_load,
    sum_of,
)
from ..kernels.slot_lists import list_slots, make_slot_lists
from ..kernels.state import LayerState


@inner_kernel
def _least_price(slots):
    """Return what a step costs that lets no load leave: of those the best one is taken."""
    return LOAD_SCALE / slots / 64


@inner_kernel
def _rate(gain, leaving, least_price):
    """Return the excess that a step removes per load that leaves its home node by it."""
    return gain / 1.0 if leaving < 0 else gain / max(leaving + least_price, 1.0)


@inner_kernel
def _leaves_more(home, before, after):
    """Return the share of a replica that leaves its home by moving from one node to another."""
    return np.int64(home != after) - np.int64(home != before)


@inner_kernel
def _swap_out(state, ranks, home, hot, target):
    """Find the best exchange off a rank, by excess removed per load that leaves.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        home: int64 [experts].
        hot: the rank.
        target: int64, time.

    Returns:
        (rate, slot here, slot there); slots -1 for none.
    """
    _, replicas, expert_of, share_of, rank_load = state
    start, rank_of, node_of, _, _, slowness = ranks
    least_price = _least_price(expert_of.size)
    best_rate = 0.0
    best_i = np.int64(-1)
    best_j = np.int64(-1)
    slow = slowness[hot]
    most = over(rank_load[hot] * slow, target)
    here = node_of[hot]
    for i in range(start[hot], start[hot + 1]):
        a = expert_of[i]
        for j in range(expert_of.size):
            step = share_of[i] - share_of[j]
            if step <= 0:
                continue
            q = rank_of[j]
            slack = target - rank_load[q] * slowness[q]
            gain = excess_removed(step, most, slow, slowness[q], slack)
            if gain <= 0:
                continue
            there = node_of[q]
            leaving = share_of[i] * _leaves_more(home[a], here, there)
            leaving += share_of[j] * _leaves_more(home[expert_of[j]], there, here)
            rate = _rate(gain, leaving, least_price)
            if rate <= best_rate:
                continue
            if q == hot or not may_swap(expert_of, replicas, start, i, j, hot, q):
                continue
            best_rate = rate
            best_i = i
            best_j = j
    return best_rate, best_i, best_j


@inner_kernel
def _count_away(home, lists, rank_of, node_of, expert):
    """Count the replicas of an expert that are not on its home node."""
    following = lists.next
    away = 0
    t = lists.first[expert]
    while t >= 0:
        away += home[expert] != node_of[rank_of[t]]
        t = following[t]
    return away


@inner_kernel
def _replace_out(state, ranks, home, lists, hot, target, best_rate):
    """Find the best re-replication for an expert of a rank, by excess removed per load that leaves.

    Args:
        state: `LayerState`.
        ranks: `Ranks`.
        home: int64 [experts].
        lists: `SlotLists`, written.
        hot: the rank.
        target: int64, time.
        best_rate: float64, rate that is to be beaten.

    Returns:
        (slot, expert); slot -1 for none.
    """
    load, replicas, expert_of, share_of, rank_load = state
    start, rank_of, node_of, _, _, slowness = ranks
    first, following = lists
    least_price = _least_price(expert_of.size)
    best_slot = -1
    best_expert = np.int64(-1)
    list_slots(expert_of, lists)
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_e = load[e] // (replicas[e] + 1)
        drop = share_of[i] - share_e
        relief = excess_relieved(e, drop, lists, rank_of, rank_load, slowness, target)
        if relief <= 0:
            continue
        away_e = _count_away(home, lists, rank_of, node_of, e)
        for s in range(expert_of.size):
            f = expert_of[s]
            if f == e or replicas[f] < 2:
                continue
            r = rank_of[s]
            if r == hot or holds(expert_of, start, r, e):
                continue
            gain = relief - excess_gained(rank_load[r], share_e - share_of[s], slowness[r], target)
            if gain <= 0:
                continue
            share_f = load[f] // (replicas[f] - 1)
            away_f = 0
            t = first[f]
            while t >= 0:
                q = rank_of[t]
                away_f += home[f] != node_of[q]
                if t != s:
                    gain -= excess_gained(rank_load[q], share_f - share_of[s], slowness[q], target)
                t = following[t]
            if gain <= 0:
                continue
            leaving = share_e * (away_e + (home[e] != node_of[r])) - share_of[i] * away_e
            leaving += share_f * (away_f - (home[f] != node_of[r])) - share_of[s] * away_f
            rate = _rate(gain, leaving, least_price)
            if rate > best_rate:
                best_rate = rate
                best_slot = s
                best_expert = e
    return best_slot, best_expert


@inner_kernel
def _bring_home(state, ranks, home, target):
    """Exchange replicas of different nodes where less load leaves and no rank rises above `target`.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        home: int64 [experts].
        target: int64, time.

    Returns:
        Whether any was exchanged.
    """
    _, replicas, expert_of, share_of, rank_load = state
    start, rank_of, node_of, _, _, slowness = ranks
    changed = False
    for i in range(expert_of.size):
        a = expert_of[i]
        r = rank_of[i]
        if home[a] == node_of[r]:
            continue
        best = np.int64(0)
        best_j = np.int64(-1)
        for j in range(expert_of.size):
            q = rank_of[j]
            if node_of[q] == node_of[r]:
                continue
            leaving = share_of[i] * _leaves_more(home[a], node_of[r], node_of[q])
            leaving += share_of[j] * _leaves_more(home[expert_of[j]], node_of[q], node_of[r])
            if leaving >= best:
                continue
            step = share_of[i] - share_of[j]
            if (rank_load[r] - step) * slowness[r] > max(target, rank_load[r] * slowness[r]):
                continue
            if (rank_load[q] + step) * slowness[q] > max(target, rank_load[q] * slowness[q]):
                continue
            if not may_swap(expert_of, replicas, start, i, j, r, q):
                continue
            best = leaving
            best_j = j
        if best_j >= 0:
            exchange(state, i, best_j, r, rank_of[best_j])
            changed = True
    return changed


@inner_kernel(makes_arrays=True)
def _relax_layer(state, ranks, home, lists, target):
    """Bring a layer's ranks to `target`, letting as little load as possible leave its home node.

    Args:
        state: `LayerState`, updated.
        ranks: `Ranks`.
        home: int64 [experts].
        lists: `SlotLists`, scratch.
        target: int64, time.
    """
    _, replicas, expert_of, _, rank_load = state
    stuck = np.zeros(rank_load.size, np.bool_)
    for _ in range(8 * expert_of.size):
        hot = busiest_free(rank_load, ranks.slowness, target, stuck)
        if hot < 0:
            break
        rate, i, j = _swap_out(state, ranks, home, hot, target)
        slot = np.int64(-1)
        expert = np.int64(-1)
        if expert_of.size > replicas.size:
            slot, expert = _replace_out(state, ranks, home, lists, hot, target, rate)
        if slot >= 0:
            replace_replica(state, ranks.rank_of, slot, expert)
        elif i >= 0:
            exchange(state, i, j, hot, ranks.rank_of[j])
        else:
            stuck[hot] = True
            continue
        stuck[:] = False
    for _ in range(4):
        if not _bring_home(state, ranks, home, target):
            break


@kernel
def relax_layers(load, home, ranks, total_slowness, target_factor, table):
    """Bring every layer's ranks to a multiple of the mean time, at the least load that leaves.

    Args:
        load: float64 [layers, experts].
        home: int64 [layers, experts], home node of each expert.
        ranks: `Ranks`.
        total_slowness: float64, sum over ranks with slots of 1 / slowness.
        target_factor: float64, target over the mean time.
        table: int32 [layers, slots], updated.
    """
    layers, experts = load.shape
    slots = table.shape[1]
    scaled = np.empty(experts, np.int64)
    replicas = np.empty(experts, np.int64)
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(ranks.slowness.size, np.int64)
    lists = make_slot_lists(experts, slots)
    target = np.int64(LOAD_SCALE / total_slowness * target_factor)
    for layer in range(layers):
        if scale_load(load[layer], sum_of(load[layer]), scaled) == 0.0:
            continue
        state = LayerState(scaled, replicas, table[layer], share_of, rank_load)
        count_replicas(table[layer], replicas)
        measure(state, ranks.start)
        _relax_layer(state, ranks, home[layer], lists, target)


def load_leaving(
    load: np.ndarray, plan: np.ndarray, home: np.ndarray, node_of_slot: np.ndarray
) -> float:
    """Return the share of the load that is served off its home node, 0..1.

    Args:
        load: float64 [layers, experts].
        plan: int [layers, slots].
        home: int64 [layers, experts].
        node_of_slot: int64 [slots].
    """
    leaving = 0.0
    for w, row, at in zip(load, plan, home, strict=True):
        share = w / np.maximum(np.bincount(row, minlength=w.size), 1)
        leaving += float(share[row][at[row] != node_of_slot].sum())
    total = float(load.sum())
    return leaving / total if total > 0 else 0.0
