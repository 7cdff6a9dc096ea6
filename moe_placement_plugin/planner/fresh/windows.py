"""One plan for several windows or workloads: minimise the sum over windows of the busiest rank's time.

A swap is worth what it changes in that sum; only swaps off a rank that is the busiest of some window can lower it. For such a rank all
partners are evaluated at once, window by window, over contiguous arrays.
"""

import numpy as np

from ..kernels.compiled import kernel
from ..kernels.layer import count_replicas, holds, may_swap, next_random, scale_load, sum_of


@kernel
def _measure(load, count, start, slowness, expert_of, share, rank_load):
    """Write shares [windows, slots] and rank loads [windows, ranks] from counts; returns the sum of the busiest times."""
    total = np.int64(0)
    for w in range(load.shape[0]):
        worst = np.int64(0)
        for r in range(start.size - 1):
            v = np.int64(0)
            for s in range(start[r], start[r + 1]):
                e = expert_of[s]
                share[w, s] = load[w, e] // count[e]
                v += share[w, s]
            rank_load[w, r] = v
            worst = max(worst, v * slowness[r])
        total += worst
    return total


@kernel
def _two_busiest_others(rank_load, slowness, rank):
    """(rank of the busiest other than `rank`, its time, time of the next) of one window."""
    first_rank = -1
    first = np.int64(0)
    second = np.int64(0)
    for r in range(rank_load.size):
        if r == rank:
            continue
        v = rank_load[r] * slowness[r]
        if v > first:
            second = first
            first = v
            first_rank = r
        elif v > second:
            second = v
    return first_rank, first, second


@kernel
def _add_times(cost, top, load_here, slow_here, share, slot_load, slot_slowness, others):
    """Add one window's busiest time after the exchange of a replica of load `top` with each slot."""
    for j in range(cost.size):
        step = top - share[j]
        a = max((load_here - step) * slow_here, (slot_load[j] + step) * slot_slowness[j])
        cost[j] += max(a, others[j])


@kernel
def _lowest(cost):
    best = np.int64(1 << 62)
    for j in range(cost.size):
        best = min(best, cost[j])
    return best


@kernel
def _best_swap(
    rank,
    best,
    count,
    start,
    rank_of,
    slowness,
    slot_slowness,
    expert_of,
    share,
    rank_load,
    slot_load,
    others,
    cost,
):
    """Best exchange of any replica on `rank`: (sum of busiest times, slot here, slot there), -1 if none is below `best`."""
    windows, slots = share.shape
    best_i = -1
    best_j = -1
    for w in range(windows):
        first_rank, first, second = _two_busiest_others(rank_load[w], slowness, rank)
        row = others[w]
        for j in range(slots):
            row[j] = first
        if first_rank >= 0:
            for j in range(start[first_rank], start[first_rank + 1]):
                row[j] = second
    for i in range(start[rank], start[rank + 1]):
        cost[:] = 0
        for w in range(windows):
            _add_times(
                cost,
                share[w, i],
                rank_load[w, rank],
                slowness[rank],
                share[w],
                slot_load[w],
                slot_slowness,
                others[w],
            )
        for j in range(start[rank], start[rank + 1]):
            cost[j] = 1 << 61
        if _lowest(cost) >= best:
            continue
        for j in range(slots):
            if cost[j] < best and may_swap(i, j, rank, rank_of[j], count, start, expert_of):
                best = cost[j]
                best_i = i
                best_j = j
    return best, best_i, best_j


@kernel
def _swap(i, j, rank_of, start, expert_of, share, rank_load, slot_load):
    a = rank_of[i]
    b = rank_of[j]
    for w in range(share.shape[0]):
        step = share[w, i] - share[w, j]
        rank_load[w, a] -= step
        rank_load[w, b] += step
        v = share[w, i]
        share[w, i] = share[w, j]
        share[w, j] = v
        for s in range(start[a], start[a + 1]):
            slot_load[w, s] = rank_load[w, a]
        for s in range(start[b], start[b + 1]):
            slot_load[w, s] = rank_load[w, b]
    e = expert_of[i]
    expert_of[i] = expert_of[j]
    expert_of[j] = e


@kernel
def _replace(load, count, rank_of, expert_of, share, rank_load, slot_load, slot, expert):
    """Turn `slot` into one more replica of `expert`."""
    old = expert_of[slot]
    count[old] -= 1
    count[expert] += 1
    expert_of[slot] = expert
    for s in range(expert_of.size):
        e = expert_of[s]
        if e == old or e == expert:
            for w in range(load.shape[0]):
                v = load[w, e] // count[e]
                rank_load[w, rank_of[s]] += v - share[w, s]
                share[w, s] = v
    for w in range(load.shape[0]):
        for s in range(expert_of.size):
            slot_load[w, s] = rank_load[w, rank_of[s]]


@kernel
def _best_replacement(
    load, best, count, start, rank_of, slowness, expert_of, share, rank_load, change
):
    """Best change of one slot into another replica of an expert of a busiest rank: (sum, slot, expert), slot -1 if none is below `best`."""
    windows = load.shape[0]
    slots = expert_of.size
    ranks = start.size - 1
    best_slot = -1
    best_expert = -1
    tried = np.zeros(load.shape[1], np.bool_)
    for v in range(windows):
        hot = 0
        for r in range(ranks):
            if rank_load[v, r] * slowness[r] > rank_load[v, hot] * slowness[hot]:
                hot = r
        for i in range(start[hot], start[hot + 1]):
            e = expert_of[i]
            if tried[e]:
                continue
            tried[e] = True
            for s in range(slots):
                f = expert_of[s]
                r = rank_of[s]
                if f == e or count[f] < 2 or r == hot or holds(expert_of, start, r, e):
                    continue
                total = np.int64(0)
                for w in range(windows):
                    gain = share[w, i] - load[w, e] // (count[e] + 1)
                    rise = load[w, f] // (count[f] - 1) - share[w, s]
                    for q in range(ranks):
                        change[q] = rank_load[w, q]
                    for t in range(slots):
                        if expert_of[t] == e:
                            change[rank_of[t]] -= gain
                        elif expert_of[t] == f:
                            change[rank_of[t]] += rise
                    change[r] += load[w, e] // (count[e] + 1) - load[w, f] // (count[f] - 1)
                    worst = np.int64(0)
                    for q in range(ranks):
                        worst = max(worst, change[q] * slowness[q])
                    total += worst
                    if total >= best:
                        break
                if total < best:
                    best = total
                    best_slot = s
                    best_expert = e
    return best, best_slot, best_expert


@kernel
def refine_windows(load, count, start, rank_of, slowness, expert_of, target, kicks, seed):
    """Lower the sum over windows of the busiest rank's time of one layer to `target`, as far as `kicks` allow.

    Args:
        load: int64 [windows, experts]; count: int64 [experts], updated; start: int64 [ranks + 1]; rank_of: int64 [slots];
        slowness: int64 [ranks]; expert_of: int32 [slots], updated; target: sum at which to stop; kicks: at most; seed: of the kicks.

    Returns:
        The sum reached.
    """
    windows = load.shape[0]
    slots = expert_of.size
    ranks = start.size - 1
    share = np.empty((windows, slots), np.int64)
    rank_load = np.empty((windows, ranks), np.int64)
    slot_load = np.empty((windows, slots), np.int64)
    others = np.empty((windows, slots), np.int64)
    cost = np.empty(slots, np.int64)
    change = np.empty(ranks, np.int64)
    slot_slowness = slowness[rank_of]
    state = np.full(1, seed, np.int64)
    best = _measure(load, count, start, slowness, expert_of, share, rank_load)
    if ranks < 2:
        return best
    best_expert_of = expert_of.copy()
    best_count = count.copy()
    redundant = slots > load.shape[1]
    now = best
    tried = 0
    while True:
        for w in range(windows):
            for s in range(slots):
                slot_load[w, s] = rank_load[w, rank_of[s]]
        while now > target:
            idle = 0
            w = 0
            while idle < windows and now > target:
                hot = 0
                for r in range(ranks):
                    if rank_load[w, r] * slowness[r] > rank_load[w, hot] * slowness[hot]:
                        hot = r
                value, i, j = _best_swap(
                    hot,
                    now,
                    count,
                    start,
                    rank_of,
                    slowness,
                    slot_slowness,
                    expert_of,
                    share,
                    rank_load,
                    slot_load,
                    others,
                    cost,
                )
                if i >= 0:
                    _swap(i, j, rank_of, start, expert_of, share, rank_load, slot_load)
                    now = value
                    idle = 0
                else:
                    idle += 1
                w = (w + 1) % windows
            if now <= target or not redundant or tried % 8 != 0:
                break
            value, slot, expert = _best_replacement(
                load, now, count, start, rank_of, slowness, expert_of, share, rank_load, change
            )
            if slot < 0:
                break
            _replace(load, count, rank_of, expert_of, share, rank_load, slot_load, slot, expert)
            now = value
        if now < best:
            best = now
            best_expert_of[:] = expert_of
            best_count[:] = count
        if best <= target or tried >= kicks:
            break
        if now > best:
            expert_of[:] = best_expert_of
            count[:] = best_count
            now = _measure(load, count, start, slowness, expert_of, share, rank_load)
            for w in range(windows):
                for s in range(slots):
                    slot_load[w, s] = rank_load[w, rank_of[s]]
        tried += 1
        for _ in range(1 + next_random(state) % 3):
            w = next_random(state) % windows
            hot = 0
            for r in range(ranks):
                if rank_load[w, r] * slowness[r] > rank_load[w, hot] * slowness[hot]:
                    hot = r
            i = start[hot] + next_random(state) % (start[hot + 1] - start[hot])
            j = next_random(state) % slots
            a = expert_of[i]
            b = expert_of[j]
            r = rank_of[j]
            if r == hot or a == b:
                continue
            if (
                redundant
                and count[b] > 1
                and next_random(state) % 2 == 0
                and not holds(expert_of, start, r, a)
            ):
                _replace(load, count, rank_of, expert_of, share, rank_load, slot_load, j, a)
            elif may_swap(i, j, hot, r, count, start, expert_of):
                _swap(i, j, rank_of, start, expert_of, share, rank_load, slot_load)
        now = _measure(load, count, start, slowness, expert_of, share, rank_load)
    expert_of[:] = best_expert_of
    count[:] = best_count
    return best


@kernel
def plan_windows(
    load, weight, start, rank_of, slowness, total_slowness, tolerance, kicks, seed, plan
):
    """Refine every layer of `plan` for several windows at once.

    Args:
        load: float64 [windows, layers, experts]; weight: float64 [windows], adding up to 1: what a window counts for;
        total_slowness: sum of 1 / slowness over ranks with slots; tolerance: a layer is done when the sum is within this fraction of
        perfect balance; plan: int32 [layers, slots], updated. The rest as `refine_windows`.
    """
    windows, layers, experts = load.shape
    scaled = np.zeros((windows, experts), np.int64)
    count = np.empty(experts, np.int64)
    for layer in range(layers):
        sum_of_means = 0.0
        for w in range(windows):
            total = sum_of(load[w, layer])
            # A window's total stands for its weight: the sum over windows is in units of one layer.
            factor = scale_load(
                load[w, layer], total / weight[w] if weight[w] > 0 else 0.0, scaled[w]
            )
            sum_of_means += total * factor / total_slowness
        if sum_of_means == 0.0:
            continue
        count_replicas(plan[layer], count)
        target = np.int64(sum_of_means * (1.0 + tolerance))
        refine_windows(
            scaled, count, start, rank_of, slowness, plan[layer], target, kicks, seed + layer
        )
