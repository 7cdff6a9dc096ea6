"""The soft form of keeping groups on nodes: load may leave its home node, at a price.

Starting from the hierarchical plan, ranks are brought below a target time by the exchanges and re-replications that let least load leave
for the
excess they remove. Run for a ladder of targets this gives the curve of load leaving its home node against balance.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import (
    LOAD_SCALE,
    busiest_free,
    count_replicas,
    exchange,
    holds,
    may_swap,
    measure,
    over,
    replace_replica,
    scale_load,
    sum_of,
)


@kernel
def _swap_out(
    hot,
    target,
    home,
    node_of,
    count,
    start,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    free,
):
    """Best exchange off rank `hot` by excess removed per load that leaves: (rate, slot here, slot there)."""
    best_rate = 0.0
    best_i = -1
    best_j = -1
    excess_hot = over(rank_load[hot] * slowness[hot], target)
    node_hot = node_of[hot]
    for i in range(start[hot], start[hot + 1]):
        a = expert_of[i]
        for j in range(expert_of.size):
            step = share_of[i] - share_of[j]
            if step <= 0:
                continue
            q = rank_of[j]
            before = rank_load[q] * slowness[q]
            gain = (
                excess_hot
                - over((rank_load[hot] - step) * slowness[hot], target)
                + over(before, target)
                - over((rank_load[q] + step) * slowness[q], target)
            )
            if gain <= 0:
                continue
            b = expert_of[j]
            node_q = node_of[q]
            leaving = np.int64(0)
            if node_q != node_hot:
                leaving += share_of[i] * (
                    np.int64(home[a] != node_q) - np.int64(home[a] != node_hot)
                )
                leaving += share_of[j] * (
                    np.int64(home[b] != node_hot) - np.int64(home[b] != node_q)
                )
            rate = gain / max(leaving + free, 1.0)
            if leaving < 0:
                rate = gain / 1.0
            if rate <= best_rate:
                continue
            if q == hot or not may_swap(i, j, hot, q, count, start, expert_of):
                continue
            best_rate = rate
            best_i = i
            best_j = j
    return best_rate, best_i, best_j


@kernel
def _replace_out(
    hot,
    target,
    best_rate,
    home,
    node_of,
    load,
    count,
    start,
    rank_of,
    slowness,
    expert_of,
    share_of,
    rank_load,
    free,
    first_slot,
    next_slot,
):
    """Best re-replication for an expert of rank `hot` by excess removed per load that leaves: (rate, slot, expert)."""
    best_slot = -1
    best_expert = -1
    slots = expert_of.size
    first_slot[:] = -1
    for s in range(slots):
        next_slot[s] = first_slot[expert_of[s]]
        first_slot[expert_of[s]] = s
    for i in range(start[hot], start[hot + 1]):
        e = expert_of[i]
        share_e = load[e] // (count[e] + 1)
        drop = share_of[i] - share_e
        relief = np.int64(0)
        away_e = 0
        t = first_slot[e]
        while t >= 0:
            r = rank_of[t]
            relief += over(rank_load[r] * slowness[r], target) - over(
                (rank_load[r] - drop) * slowness[r], target
            )
            away_e += home[e] != node_of[r]
            t = next_slot[t]
        if relief <= 0:
            continue
        for s in range(slots):
            f = expert_of[s]
            if f == e or count[f] < 2:
                continue
            r = rank_of[s]
            if r == hot or holds(expert_of, start, r, e):
                continue
            share_f = load[f] // (count[f] - 1)
            gain = (
                relief
                + over(rank_load[r] * slowness[r], target)
                - over((rank_load[r] - share_of[s] + share_e) * slowness[r], target)
            )
            if gain <= 0:
                continue
            away_f = 0
            t = first_slot[f]
            while t >= 0:
                q = rank_of[t]
                away_f += home[f] != node_of[q]
                if t != s:
                    gain -= over(
                        (rank_load[q] + share_f - share_of[s]) * slowness[q], target
                    ) - over(rank_load[q] * slowness[q], target)
                t = next_slot[t]
            if gain <= 0:
                continue
            leaving = share_e * (away_e + (home[e] != node_of[r])) - share_of[i] * away_e
            leaving += share_f * (away_f - (home[f] != node_of[r])) - share_of[s] * away_f
            rate = gain / 1.0 if leaving < 0 else gain / max(leaving + free, 1.0)
            if rate > best_rate:
                best_rate = rate
                best_slot = s
                best_expert = e
    return best_rate, best_slot, best_expert


@kernel
def _bring_home(
    target, home, node_of, count, start, rank_of, slowness, expert_of, share_of, rank_load
):
    """Exchange replicas of different nodes where less load leaves and no rank rises above `target`; returns whether any was."""
    slots = expert_of.size
    changed = False
    for i in range(slots):
        a = expert_of[i]
        r = rank_of[i]
        if home[a] == node_of[r]:
            continue
        best = np.int64(0)
        best_j = -1
        for j in range(slots):
            q = rank_of[j]
            if node_of[q] == node_of[r]:
                continue
            b = expert_of[j]
            leaving = share_of[i] * (np.int64(home[a] != node_of[q]) - 1)
            leaving += share_of[j] * (
                np.int64(home[b] != node_of[r]) - np.int64(home[b] != node_of[q])
            )
            if leaving >= best:
                continue
            step = share_of[i] - share_of[j]
            if (rank_load[r] - step) * slowness[r] > max(target, rank_load[r] * slowness[r]):
                continue
            if (rank_load[q] + step) * slowness[q] > max(target, rank_load[q] * slowness[q]):
                continue
            if not may_swap(i, j, r, q, count, start, expert_of):
                continue
            best = leaving
            best_j = j
        if best_j >= 0:
            exchange(expert_of, share_of, rank_load, i, best_j, r, rank_of[best_j])
            changed = True
    return changed


@kernel
def relax_layers(
    load, home, node_of, start, rank_of, slowness, total_speed_slowness, target_factor, plan
):
    """Bring every layer's ranks to `target_factor` times the mean time, letting as little load as possible leave its home node.

    Args:
        load: float64 [layers, experts]; home: int64 [layers, experts], home node of each expert; node_of: int64 [ranks];
        start: int64 [ranks + 1]; rank_of: int64 [slots]; slowness: int64 [ranks];
        total_speed_slowness: sum over ranks with slots of 1 / slowness; plan: int32 [layers, slots], updated.
    """
    layers, experts = load.shape
    slots = plan.shape[1]
    ranks = start.size - 1
    scaled = np.empty(experts, np.int64)
    count = np.empty(experts, np.int64)
    share_of = np.empty(slots, np.int64)
    rank_load = np.empty(ranks, np.int64)
    first_slot = np.empty(experts, np.int64)
    next_slot = np.empty(slots, np.int64)
    for layer in range(layers):
        if scale_load(load[layer], sum_of(load[layer]), scaled) == 0.0:
            continue
        expert_of = plan[layer]
        count_replicas(expert_of, count)
        measure(scaled, count, start, expert_of, share_of, rank_load)
        mean = LOAD_SCALE / total_speed_slowness
        target = np.int64(mean * target_factor)
        # Exchanges that let no load leave cost this much, so that among them the one that gains most is taken.
        free = LOAD_SCALE / slots / 64
        stuck = np.zeros(ranks, np.bool_)
        for _ in range(8 * slots):
            hot = busiest_free(rank_load, slowness, target, stuck)
            if hot < 0:
                break
            rate, i, j = _swap_out(
                hot,
                target,
                home[layer],
                node_of,
                count,
                start,
                rank_of,
                slowness,
                expert_of,
                share_of,
                rank_load,
                free,
            )
            slot = -1
            if slots > experts:
                rate, slot, expert = _replace_out(
                    hot,
                    target,
                    rate,
                    home[layer],
                    node_of,
                    scaled,
                    count,
                    start,
                    rank_of,
                    slowness,
                    expert_of,
                    share_of,
                    rank_load,
                    free,
                    first_slot,
                    next_slot,
                )
            if slot >= 0:
                replace_replica(
                    scaled, count, start, rank_of, expert_of, share_of, rank_load, slot, expert
                )
            elif i >= 0:
                exchange(expert_of, share_of, rank_load, i, j, hot, rank_of[j])
            else:
                stuck[hot] = True
                continue
            stuck[:] = False
        for _ in range(4):
            if not _bring_home(
                target,
                home[layer],
                node_of,
                count,
                start,
                rank_of,
                slowness,
                expert_of,
                share_of,
                rank_load,
            ):
                break


def load_leaving(
    load: np.ndarray, plan: np.ndarray, home: np.ndarray, node_of_slot: np.ndarray
) -> float:
    """Share of the load that is served off its home node, 0..1.

    Args:
        load: float64 [layers, experts]; plan: int [layers, slots]; home: int64 [layers, experts]; node_of_slot: int64 [slots].
    """
    leaving = 0.0
    for w, row, at in zip(load, plan, home, strict=True):
        share = w / np.maximum(np.bincount(row, minlength=w.size), 1)
        leaving += float(share[row][at[row] != node_of_slot].sum())
    total = float(load.sum())
    return leaving / total if total > 0 else 0.0
