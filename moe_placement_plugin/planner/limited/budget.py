"""A plan within a move budget: which layers get how many of the moves."""

from itertools import pairwise
from typing import Any

import numpy as np

from ..fresh.replicate import largest_replica, order_by_load, replicate_sorted
from ..kernels.bound import busiest_at_least
from ..kernels.compiled import kernel
from ..kernels.evaluate import keep_slots
from ..kernels.layer import busiest, count_replicas, measure, scale_load, sum_of
from ..nodes.fixed_groups import home_bounds
from .descent import descend_moves

REPLICA_CAP = 1.3
"""Largest replica of a move-limited plan over the largest of a fresh one: well above it the next window suffers."""

_LADDER = (1.0, 3.0, 8.0, 20.0, 60.0)
"""Multiples of the tolerance that are tried where the budget does not reach the tolerance itself."""


@kernel
def _bounds(load, order, start, inverse_speed, bound, largest):
    """Write float64 [layers] each: lower bound of the busiest rank's time, and largest replica of the optimal replication."""
    layers, experts = load.shape
    slots = start[-1]
    used = 0
    for r in range(start.size - 1):
        if start[r + 1] > start[r]:
            used += 1
    count = np.empty(experts, np.int64)
    heap_value = np.empty(slots + 1, np.float64)
    heap_expert = np.empty(slots + 1, np.int64)
    for layer in range(layers):
        w = load[layer]
        head = replicate_sorted(w, order[layer], slots, used, count, heap_value, heap_expert)
        largest[layer] = largest_replica(w, order[layer], count, head)
        bound[layer] = busiest_at_least(
            w, order[layer], largest[layer], start, inverse_speed, slots, slots == experts
        )


@kernel
def _run_layers(
    load,
    bound,
    largest,
    node_slots,
    start,
    rank_of,
    slowness,
    unit,
    old,
    tolerance,
    cap_factor,
    plan,
    slot,
    expert,
    moves,
    time,
    steps,
    first_time,
):
    """Move-limited descent of every layer to its lower bound times 1 + tolerance; see `descend_moves` for the outputs, by layer."""
    layers, experts = load.shape
    count = np.empty(experts, np.int64)
    scaled = np.empty(experts, np.int64)
    share_of = np.empty(rank_of.size, np.int64)
    rank_load = np.empty(start.size - 1, np.int64)
    for layer in range(layers):
        steps[layer] = 0
        first_time[layer] = 0
        plan[layer] = old[layer]
        factor = scale_load(load[layer], sum_of(load[layer]), scaled)
        if factor == 0.0:
            continue
        target = np.int64(bound[layer] * factor * unit * (1.0 + tolerance))
        cap = np.int64(largest[layer] * factor * cap_factor)
        count_replicas(old[layer], count)
        measure(scaled, count, start, old[layer], share_of, rank_load)
        first_time[layer] = busiest(rank_load, slowness, 0, start.size - 1)[1]
        steps[layer] = descend_moves(
            scaled,
            count,
            node_slots,
            start,
            rank_of,
            slowness,
            plan[layer],
            share_of,
            rank_load,
            target,
            cap,
            slot[layer],
            expert[layer],
            moves[layer],
            time[layer],
        )


def _allocate(curves, budget):
    """Choose one point of every layer's curve, the total moves within `budget`, for the lowest total time.

    Args:
        curves: per layer a list of (moves, time, ...) with the old placement, 0 moves, first.

    Returns:
        The chosen index into each curve. Greedy along the lower convex hulls, steepest segment first.
    """
    segments = []
    for layer, points in enumerate(curves):
        hull = [0]
        for k in sorted(range(1, len(points)), key=lambda k: (points[k][0], points[k][1])):
            if points[k][1] >= points[hull[-1]][1]:
                continue
            if points[k][0] <= points[hull[-1]][0]:
                hull[-1] = k
                continue
            while len(hull) > 1:
                a, b = points[hull[-2]], points[hull[-1]]
                if (a[1] - b[1]) * (points[k][0] - b[0]) > (b[1] - points[k][1]) * (b[0] - a[0]):
                    break
                hull.pop()
            hull.append(k)
        for a, b in pairwise(hull):
            cost = points[b][0] - points[a][0]
            segments.append(((points[a][1] - points[b][1]) / max(cost, 1e-9), layer, b, cost))
    segments.sort(key=lambda s: (-s[0], s[1]))
    chosen = [0] * len(curves)
    blocked = set()
    for _, layer, point, cost in segments:
        if layer in blocked:
            continue
        if cost > budget:
            blocked.add(layer)
            continue
        budget -= cost
        chosen[layer] = point
    return chosen


def move_limited(load, ranks, old, tolerance, max_moves, cap_factor=REPLICA_CAP, expert_home=None):
    """The plan nearest to `old` whose layers are within `tolerance` of their lower bound, or the best one within `max_moves`.

    Args:
        load: float64 [layers, experts]; ranks: `Ranks`; old: int32 [layers, slots], the placement in service;
        tolerance: fraction above the lower bound at which a layer is done; max_moves: slots that may change rank, over all layers, or None.
        cap_factor: largest replica over that of a fresh plan.
        expert_home: int64 [layers, experts], node that an expert is on and stays on, ranks sorted by node; None where any rank will do.

    Returns:
        int32 [layers, slots]: slots that keep their expert are untouched.
    """
    layers = load.shape[0]
    slots = ranks.num_slots
    max_steps = 3 * slots
    bound = np.empty(layers, np.float64)
    largest = np.empty(layers, np.float64)
    if expert_home is None:
        node_slots = np.tile(np.array([0, slots]), (ranks.num_ranks, 1))
        _bounds(load, order_by_load(load), ranks.start, ranks.inverse_speed, bound, largest)
    else:
        nodes = np.arange(ranks.num_nodes)
        edges = [np.searchsorted(ranks.node_of, nodes, side) for side in ("left", "right")]
        node_slots = np.stack([ranks.start[edge] for edge in edges], axis=1)[ranks.node_of]
        home_bounds(
            load,
            order_by_load(load),
            expert_home,
            ranks.start,
            ranks.node_of,
            ranks.inverse_speed,
            bound,
            largest,
        )
    slot = np.empty((layers, max_steps, 2), np.int64)
    expert = np.empty((layers, max_steps, 2), np.int32)
    moves = np.empty((layers, max_steps), np.int64)
    time = np.empty((layers, max_steps), np.int64)
    steps = np.empty(layers, np.int64)
    first_time = np.empty(layers, np.int64)
    plan = np.empty_like(old)
    curves: list[list[tuple[int, float, Any, int]]] = [[(0, 0.0, None, 0)] for _ in range(layers)]
    totals = load.sum(axis=1)
    for factor in _LADDER:
        _run_layers(
            load,
            bound,
            largest,
            node_slots,
            ranks.start,
            ranks.rank_of,
            ranks.slowness,
            ranks.unit,
            old,
            tolerance * factor,
            cap_factor,
            plan,
            slot,
            expert,
            moves,
            time,
            steps,
            first_time,
        )
        needed = int(sum(moves[layer, n - 1] for layer, n in enumerate(steps) if n))
        if factor == 1.0:
            if max_moves is None or needed <= max_moves:
                keep_slots(old, plan, ranks.start)
                return plan
            for layer in range(layers):
                curves[layer][0] = (0, float(first_time[layer] * totals[layer]), None, 0)
        for layer in range(layers):
            n = int(steps[layer])
            if n:
                log = (slot[layer, :n].copy(), expert[layer, :n].copy())
                curves[layer].extend(
                    (int(m), float(t * totals[layer]), log, k + 1)
                    for k, (m, t) in enumerate(zip(moves[layer, :n], time[layer, :n], strict=True))
                )
        if needed <= max_moves:
            break
    chosen = _allocate(curves, max_moves)
    plan = old.copy()
    for layer, point in enumerate(chosen):
        _, _, log, n = curves[layer][point]
        for k in range(n):
            for side in range(2):
                if log[0][k, side] >= 0:
                    plan[layer, log[0][k, side]] = log[1][k, side]
    keep_slots(old, plan, ranks.start)
    return plan
