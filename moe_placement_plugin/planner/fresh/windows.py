"""Make one plan for several windows: minimise the sum over windows of the busiest rank's time.

A swap is worth what it changes in that sum; only swaps off a rank that is the busiest of some
window can lower it. For such a rank all partners are evaluated at once, window by window, over
contiguous arrays.
"""

import numpy as np

from ..kernels.compiled import inner_kernel, kernel
from ..kernels.layer import busiest, count_replicas, scale_load, sum_of
from ..kernels.state import WindowsState
from .kicks import EXCHANGE, REPLACE, draw_step, next_random
from .window_steps import best_replacement, best_swap, measure_windows, replace, swap


@inner_kernel(makes_arrays=True)
def _descend(state, ranks, now, target, replacing, slot_slowness):
    """Swap, and replace where swaps are stuck, until the sum is at `target` or nothing lowers it.

    Args:
        state: `WindowsState`, updated.
        ranks: `Ranks`.
        now: int64, sum of busiest times.
        target: int64, sum at which to stop.
        replacing: whether to change which experts are replicated.
        slot_slowness: int64 [slots], slowness of each slot's rank.

    Returns:
        The sum reached.
    """
    windows, slots = state.share_of.shape
    others = np.empty((windows, slots), np.int64)
    cost = np.empty(slots, np.int64)
    change = np.empty(ranks.slowness.size, np.int64)
    while now > target:
        idle = 0
        w = 0
        while idle < windows and now > target:
            hot = busiest(state.rank_load[w], ranks.slowness)[0]
            value, i, j = best_swap(state, ranks, hot, now, slot_slowness, others, cost)
            if i >= 0:
                swap(state, ranks, i, j)
                now = value
                idle = 0
            else:
                idle += 1
            w = (w + 1) % windows
        if now <= target or not replacing:
            break
        value, slot, expert = best_replacement(state, ranks, now, change)
        if slot < 0:
            break
        replace(state, ranks, slot, expert)
        now = value
    return now


@inner_kernel(makes_arrays=True)
def refine_windows(load, replicas, expert_of, ranks, target, kicks, seed):
    """Lower the sum over windows of the busiest rank's time of one layer, as far as kicks allow.

    Args:
        load: int64 [windows, experts].
        replicas: int64 [experts], updated.
        expert_of: int32 [slots], updated.
        ranks: `Ranks`.
        target: int64, sum at which to stop.
        kicks: how many at most.
        seed: of the kicks.
    """
    windows, experts = load.shape
    slots = expert_of.size
    state = WindowsState(
        load,
        replicas,
        expert_of,
        np.empty((windows, slots), np.int64),
        np.empty((windows, ranks.slowness.size), np.int64),
        np.empty((windows, slots), np.int64),
    )
    now = measure_windows(state, ranks)
    if ranks.slowness.size < 2:
        return
    slot_slowness = ranks.slowness[ranks.rank_of]
    random = np.full(1, seed, np.int64)
    best = now
    best_expert_of = expert_of.copy()
    best_replicas = replicas.copy()
    redundant = slots > experts
    tried = 0
    while True:
        now = _descend(state, ranks, now, target, redundant and tried % 8 == 0, slot_slowness)
        if now < best:
            best = now
            best_expert_of[:] = expert_of
            best_replicas[:] = replicas
        if best <= target or tried >= kicks:
            break
        if now > best:
            expert_of[:] = best_expert_of
            replicas[:] = best_replicas
            measure_windows(state, ranks)
        tried += 1
        for _ in range(1 + next_random(random) % 3):
            w = next_random(random) % windows
            hot = busiest(state.rank_load[w], ranks.slowness)[0]
            what, i, j = draw_step(state, ranks, hot, redundant, random)
            if what == REPLACE:
                replace(state, ranks, j, np.int64(expert_of[i]))
            elif what == EXCHANGE:
                swap(state, ranks, i, j)
        now = measure_windows(state, ranks)
    expert_of[:] = best_expert_of
    replicas[:] = best_replicas


@kernel
def plan_windows(load, weight, ranks, total_slowness, limits, table):
    """Refine every layer of a plan for several windows at once.

    Args:
        load: float64 [windows, layers, experts].
        weight: float64 [windows], adding up to 1: what a window counts for.
        ranks: `Ranks`.
        total_slowness: float64, sum of 1 / slowness over ranks with slots.
        limits: `SearchLimits`; a layer is done when the sum is within the tolerance of perfect
            balance.
        table: int32 [layers, slots], updated.
    """
    windows, layers, experts = load.shape
    scaled = np.zeros((windows, experts), np.int64)
    replicas = np.empty(experts, np.int64)
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
        count_replicas(table[layer], replicas)
        target = np.int64(sum_of_means * (1.0 + limits.tolerance))
        refine_windows(scaled, replicas, table[layer], ranks, target, limits.kicks, layer)
