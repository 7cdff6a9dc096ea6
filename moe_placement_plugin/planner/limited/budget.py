"""Plan within a budget of moves: which layers get how many of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..fresh.replicate import largest_replica, order_by_load, replicate_sorted
from ..kernels.bound import busiest_at_least
from ..kernels.compiled import kernel
from ..kernels.evaluate import keep_slots
from ..kernels.layer import busiest, count_replicas, measure, ranks_in_use, scale_load, sum_of
from ..kernels.state import Bounds, LayerState, MoveLimits, Ranks, Steps
from ..nodes.fixed_groups import home_bounds
from ..options import MoveBudget
from .allocation import Point, allocate
from .descent import descend_moves, make_history
from .screening import make_screen

_LADDER = (3.0, 8.0, 20.0, 60.0)
"""Multiples of the tolerance that are tried where the budget does not reach the tolerance."""


class _Goal(NamedTuple):
    """Say where layers are lowered to.

    Attributes:
        tolerance: float, fraction above a layer's lower bound at which it is done.
        replica_cap: float, largest replica over the largest of the optimal replication.
        unit: float, time at slowness 1 over the time at an inverse speed of 1.
        node_slots: int64 [ranks, 2], first and last + 1 of the slots of the rank's node, which no
            expert leaves.
    """

    tolerance: float
    replica_cap: float
    unit: float
    node_slots: np.ndarray


class _Descents(NamedTuple):
    """Log the descents of all layers: `Steps` by layer, and where they began and ended.

    Attributes:
        slot: int64 [layers, steps, 2].
        expert: int32 [layers, steps, 2].
        moves: int64 [layers, steps].
        time: int64 [layers, steps].
        steps: int64 [layers], how many steps each layer took.
        first_time: int64 [layers], the busiest rank's time before.
    """

    slot: np.ndarray
    expert: np.ndarray
    moves: np.ndarray
    time: np.ndarray
    steps: np.ndarray
    first_time: np.ndarray

    @property
    def needed(self) -> int:
        """Return the slots that all steps have to fetch."""
        return sum(int(self.moves[layer, n - 1]) for layer, n in enumerate(self.steps) if n)


def _make_descents(layers: int, max_steps: int) -> _Descents:
    """Return a log that is yet to be written."""
    return _Descents(
        np.empty((layers, max_steps, 2), np.int64),
        np.empty((layers, max_steps, 2), np.int32),
        np.empty((layers, max_steps), np.int64),
        np.empty((layers, max_steps), np.int64),
        np.empty(layers, np.int64),
        np.empty(layers, np.int64),
    )


@kernel
def _write_bounds(load, order, ranks, bounds):
    """Write the bounds of plans that may use any rank.

    Args:
        load: float64 [layers, experts].
        order: int64 [layers, experts], heaviest first.
        ranks: `Ranks`.
        bounds: `Bounds`, written.
    """
    layers, experts = load.shape
    start = ranks.start
    slots = ranks.rank_of.size
    used = ranks_in_use(start)
    replicas = np.empty(experts, np.int64)
    heap_value = np.empty(slots + 1, np.float64)
    heap_expert = np.empty(slots + 1, np.int64)
    for layer in range(layers):
        w = load[layer]
        head = replicate_sorted(w, order[layer], slots, used, replicas, heap_value, heap_expert)
        largest = largest_replica(w, order[layer], replicas, head)
        bounds.largest[layer] = largest
        bounds.busiest[layer] = busiest_at_least(
            w, order[layer], largest, start, ranks.inverse_speed, slots == experts
        )


@kernel
def _descend_layers(load, ranks, old, bounds, goal, table, log):
    """Lower every layer to its bound and the tolerance, with few moves.

    Args:
        load: float64 [layers, experts].
        ranks: `Ranks`.
        old: int32 [layers, slots], the placement in service.
        bounds: `Bounds`.
        goal: `_Goal`.
        table: int32 [layers, slots], written.
        log: `_Descents`, written.
    """
    layers, experts = load.shape
    tolerance, replica_cap, unit, node_slots = goal
    even = ranks.slowness.min() == ranks.slowness.max()
    replicas = np.empty(experts, np.int64)
    scaled = np.empty(experts, np.int64)
    share_of = np.empty(ranks.rank_of.size, np.int64)
    rank_load = np.empty(ranks.slowness.size, np.int64)
    history = make_history(experts, ranks.rank_of.size)
    screen = make_screen(experts, ranks.start)
    for layer in range(layers):
        log.steps[layer] = 0
        log.first_time[layer] = 0
        table[layer] = old[layer]
        factor = scale_load(load[layer], sum_of(load[layer]), scaled)
        if factor == 0.0:
            continue
        target = np.int64(bounds.busiest[layer] * factor * unit * (1.0 + tolerance))
        cap = np.int64(bounds.largest[layer] * factor * replica_cap)
        state = LayerState(scaled, replicas, table[layer], share_of, rank_load)
        count_replicas(table[layer], replicas)
        measure(state, ranks.start)
        log.first_time[layer] = busiest(rank_load, ranks.slowness)[1]
        steps = Steps(log.slot[layer], log.expert[layer], log.moves[layer], log.time[layer])
        limits = MoveLimits(target, cap, even, node_slots)
        log.steps[layer] = descend_moves(state, ranks, history, screen, limits, steps)


@dataclass(frozen=True)
class _Layers:
    """Hold what every descent of a plan begins with."""

    load: np.ndarray
    ranks: Ranks
    old: np.ndarray
    bounds: Bounds
    node_slots: np.ndarray

    def descend(self, tolerance: float, cap: float) -> tuple[np.ndarray, _Descents]:
        """Lower every layer; return the table, int32 [layers, slots], and how it came about."""
        table = np.empty_like(self.old)
        log = _make_descents(self.load.shape[0], 3 * self.ranks.num_slots)
        goal = _Goal(tolerance, cap, self.ranks.unit, self.node_slots)
        _descend_layers(self.load, self.ranks, self.old, self.bounds, goal, table, log)
        return table, log


def _prepare(
    load: np.ndarray, ranks: Ranks, old: np.ndarray, expert_home: np.ndarray | None
) -> _Layers:
    """Bound every layer and say within which slots its experts may move."""
    bounds = Bounds(np.empty(load.shape[0], np.float64), np.empty(load.shape[0], np.float64))
    if expert_home is None:
        _write_bounds(load, order_by_load(load), ranks, bounds)
        node_slots = np.tile(np.array([0, ranks.num_slots], np.int64), (ranks.num_ranks, 1))
    else:
        home_bounds(load, order_by_load(load), expert_home, ranks, bounds)
        nodes = np.arange(ranks.num_nodes)
        edges = [np.searchsorted(ranks.node_of, nodes, side) for side in ("left", "right")]
        node_slots = np.stack([ranks.start[edge] for edge in edges], axis=1)[ranks.node_of]
    return _Layers(load, ranks, old, bounds, node_slots)


def _curves(logs: list[_Descents], totals: np.ndarray) -> list[list[Point]]:
    """Return the points that each layer can come to, the placement in service first.

    Args:
        logs: the descents.
        totals: float64 [layers], load: times count in parts of it.
    """
    curves = [[Point(0, float(time), 0, 0)] for time in logs[0].first_time * totals]
    for ladder, log in enumerate(logs):
        for layer, n in enumerate(log.steps):
            times = log.time[layer, :n] * totals[layer]
            curves[layer].extend(
                Point(int(moves), float(time), ladder, k + 1)
                for k, (moves, time) in enumerate(zip(log.moves[layer, :n], times, strict=True))
            )
    return curves


def _within(max_moves: int, layers: _Layers, budget: MoveBudget, first: _Descents) -> np.ndarray:
    """Return the best table, int32 [layers, slots], within a budget that `first` does not keep."""
    logs = [first]
    for factor in _LADDER:
        if logs[-1].needed <= max_moves:
            break
        logs.append(layers.descend(budget.tolerance * factor, budget.replica_cap)[1])
    curves = _curves(logs, layers.load.sum(axis=1))
    table = layers.old.copy()
    for layer, index in enumerate(allocate(curves, max_moves)):
        point = curves[layer][index]
        log = logs[point.ladder]
        for slot, expert in zip(log.slot[layer, : point.steps], log.expert[layer, : point.steps]):
            written = slot >= 0
            table[layer, slot[written]] = expert[written]
    return table


def move_limited(
    load: np.ndarray,
    ranks: Ranks,
    old: np.ndarray,
    budget: MoveBudget,
    expert_home: np.ndarray | None = None,
) -> np.ndarray:
    """Plan nearest to the placement in service, every layer within a tolerance of its lower bound.

    Where that takes more than the budget, the best plan within it. Slots that keep their expert
    are untouched.

    Args:
        load: float64 [layers, experts].
        ranks: the ranks.
        old: int32 [layers, slots], the placement in service.
        budget: how far the plan may go.
        expert_home: int64 [layers, experts], node that an expert is on and stays on, ranks sorted
            by node; None where any rank will do.

    Returns:
        int32 [layers, slots].
    """
    layers = _prepare(load, ranks, old, expert_home)
    table, log = layers.descend(budget.tolerance, budget.replica_cap)
    if budget.max_moves is not None and log.needed > budget.max_moves:
        table = _within(budget.max_moves, layers, budget, log)
    keep_slots(old, table, ranks.start)
    return table
