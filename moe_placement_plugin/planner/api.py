"""The planner's two entry points: `plan` from nothing, `replan` from the placement in service."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from ..core.errors import PlacementError
from .arguments import Ranks, as_old, as_ranks, as_windows, by_node, check_fits
from .fresh.plan import fresh_plan
from .fresh.windows import plan_windows
from .kernels.evaluate import align_layers, busiest_times, moved_slots
from .limited.budget import REPLICA_CAP, move_limited
from .nodes.coactivation import cluster_layers
from .nodes.fixed_groups import homes_in_service
from .nodes.groups import group_homes, hierarchical_plan
from .nodes.locality import load_leaving, relax_layers
from .result import Figures, LocalityPoint, Plan

MAX_WINDOWS = 16
"""More windows than this are pooled: consecutive ones are added up."""

REPLAN_TOLERANCE = 0.01
"""A rebalance leaves a layer alone within this fraction of its lower bound: less than half a point below the published planners' fresh
plans, for an eighth to a twelfth of their moves."""

LOCALITY_TARGETS = (1.6, 1.4, 1.25, 1.15, 1.1, 1.07, 1.05, 1.03, 1.02, 1.01, 1.003)
"""Busiest rank's time over the mean that the soft form is planned for, from loose to tight."""


@dataclass(frozen=True)
class Effort:
    """How long the planner searches.

    Attributes:
        swaps_per_rank: quick hot-to-cold swaps per rank and layer.
        kicks: restarts of the thorough search per layer that is not at its bound yet; -1: no thorough search.
        kicks_single: the same for layers without redundant slots, where a kick is cheap.
        window_kicks: the same for several windows.
        tolerance: a layer is done within this fraction of its lower bound.
        tolerance_single: the same for layers without redundant slots, whose bound is sharp.
    """

    swaps_per_rank: float
    kicks: int
    kicks_single: int
    window_kicks: int
    tolerance: float
    tolerance_single: float


EFFORTS = {
    "fast": Effort(0.25, -1, -1, -1, 4e-4, 4e-4),
    "best": Effort(2.0, 32, 128, 8, 4.5e-4, 2e-5),
    "thorough": Effort(0.5, 1000, 2000, 200, 1e-4, 1e-5),
}


def plan(
    load,
    slots_per_rank,
    *,
    node_of_rank=None,
    speed=None,
    num_groups: int = 1,
    locality: str = "none",
    locality_penalty: float = 1.0,
    max_leaving: float | None = None,
    coactivation=None,
    coactivation_goal: str = "node",
    coactivation_allowance: float = 0.05,
    window_weights=None,
    old=None,
    mode: str = "best",
) -> Plan:
    """Place every expert of every layer for a load.

    Replication, packing and swaps follow DeepSeek's EPLB in their first step and search on from there; see docs/planner.md.

    Args:
        load: token counts, int or float [windows, layers, experts] or [layers, experts]. With several windows (or workloads) the
        weighted sum
            over windows of the busiest rank's time is minimised; more than `MAX_WINDOWS` are pooled.
        slots_per_rank: int [ranks], at least as many in all as experts; 0 for a rank that is down.
        node_of_rank: int [ranks]; all on one node when left out.
        speed: float [ranks], relative speeds; equal when left out.
        num_groups: groups of consecutive experts, for `locality`.
        locality: "none"; "node": all experts of a group stay on one node (hierarchical); "soft": load may leave the home node of its
        group at
            a price. Both use the windows' weighted mean load.
        locality_penalty: soft form: what the share of load that leaves costs, against the busiest rank's excess over the mean.
        max_leaving: soft form: largest share of load that may leave, 0..1.
        coactivation: float [layers, experts, experts], tokens that chose both experts: exchanges raise (or lower) it as below.
        coactivation_goal: "node": chosen together, together on a node; "rank": the same for ranks; "spread": apart, on different ranks.
        coactivation_allowance: how far above the mean the busiest rank may get for that, as a fraction.
        window_weights: float [windows]: what each window counts for; equal when left out, whatever the number of its tokens.
        old: int [layers, slots], the placement in service: the plan is the same, but ranks are relabelled and slots ordered so that
            least of it moves. To plan for few moves use `replan`.
        mode: "fast" (under a millisecond for 58 layers of 256 experts), "best" or "thorough".

    Raises:
        PlacementError: when an argument cannot be honoured.
    """
    if mode not in EFFORTS:
        raise PlacementError(f"planner mode {mode!r}: choose one of {', '.join(EFFORTS)}")
    if locality not in ("none", "node", "soft"):
        raise PlacementError(f"locality {locality!r}: choose none, node or soft")
    effort = EFFORTS[mode]
    windows = as_windows(load)
    ranks = as_ranks(slots_per_rank, node_of_rank, speed)
    layers, experts = windows.shape[1:]
    check_fits(experts, ranks)
    weights = _weights(window_weights, windows.shape[0])
    single = ranks.num_slots == experts
    tolerance = effort.tolerance_single if single else effort.tolerance
    kicks = effort.kicks_single if single else effort.kicks
    swaps = int(np.ceil(effort.swaps_per_rank * ranks.num_ranks))
    mean = _mean_load(windows, weights)
    leaving, curve = None, ()
    if locality != "none" and ranks.num_nodes > 1:
        ranks, _, restore = by_node(ranks)
        homes, _ = group_homes(mean, ranks, num_groups)
        table = hierarchical_plan(mean, ranks, homes, tolerance, swaps, kicks)
        leaving = 0.0
        if locality == "soft":
            table, leaving, curve = _relax(mean, ranks, homes, table, locality_penalty, max_leaving)
        ranks, table = restore(table)
    else:
        table = fresh_plan(
            mean, ranks, tolerance, swaps, kicks if windows.shape[0] == 1 else min(kicks, 0)
        )
        if windows.shape[0] > 1 and effort.window_kicks >= 0:
            pooled, pooled_weights = _pool(windows, weights)
            plan_windows(
                pooled,
                pooled_weights,
                ranks.start,
                ranks.rank_of,
                ranks.slowness,
                ranks.total_slowness,
                tolerance,
                effort.window_kicks,
                0,
                table,
            )
    if coactivation is not None:
        _cluster(mean, coactivation, ranks, coactivation_goal, coactivation_allowance, table)
    if old is not None:
        old = as_old(old, layers, experts, ranks)
        align_layers(old, table, ranks.start, _labels(ranks), ranks.node_of, locality != "none")
    return _result(windows, weights, ranks, table, old, leaving, curve)


def replan(
    load,
    old,
    slots_per_rank,
    *,
    node_of_rank=None,
    speed=None,
    num_groups: int = 1,
    locality: str = "none",
    max_moves: int | None = None,
    max_bytes: int | None = None,
    bytes_per_expert: int | None = None,
    tolerance: float = REPLAN_TOLERANCE,
    replica_cap: float = REPLICA_CAP,
    window_weights=None,
) -> Plan:
    """Improve the placement in service with few moves.

    Layers are brought to within `tolerance` of the lower bound of their busiest rank. If that takes more than the budget the moves go where
    they lower the busiest ranks most. Slots that keep their expert are untouched.

    With `locality="node"` every group of experts stays on the node that it is on: moves are within nodes, and a layer is done when its
    busiest node is within `tolerance` of what its groups allow. Groups change nodes only in `plan`.

    Args:
        load: as for `plan`; several windows count by their weighted mean.
        old: int [layers, slots], the placement in service.
        slots_per_rank, node_of_rank, speed, num_groups, window_weights: as for `plan`.
        locality: "none", or "node".
        max_moves: slots that may change rank, over all layers; None for no limit.
        max_bytes, bytes_per_expert: the same limit in bytes of one expert of one layer.
        tolerance: fraction above the lower bound at which a layer is left alone.
        replica_cap: largest replica, over the largest of a fresh plan; without a cap the next window loses 1-2 points.

    Raises:
        PlacementError: when an argument cannot be honoured.
    """
    windows = as_windows(load)
    ranks = as_ranks(slots_per_rank, node_of_rank, speed)
    layers, experts = windows.shape[1:]
    check_fits(experts, ranks)
    if locality not in ("none", "node"):
        raise PlacementError(f"locality {locality!r}: a plan with few moves takes none or node")
    old = as_old(old, layers, experts, ranks)
    if not tolerance > 0:
        raise PlacementError(f"tolerance {tolerance}: give a positive fraction, 0.01 for 1%")
    if not replica_cap >= 1:
        raise PlacementError(
            f"replica_cap {replica_cap}: a plan cannot keep replicas smaller than the best one's; give 1 or more"
        )
    if max_bytes is not None:
        if not bytes_per_expert or bytes_per_expert < 1:
            raise PlacementError(
                "max_bytes without bytes_per_expert: give the size of one expert's weights in one layer"
            )
        limit = int(max_bytes) // int(bytes_per_expert)
        max_moves = limit if max_moves is None else min(max_moves, limit)
    if max_moves is not None and max_moves < 0:
        raise PlacementError(f"max_moves {max_moves}: give 0 or more")
    weights = _weights(window_weights, windows.shape[0])
    mean = _mean_load(windows, weights)
    if locality == "none" or ranks.num_nodes == 1:
        table = move_limited(mean, ranks, old, tolerance, max_moves, replica_cap)
        return _result(windows, weights, ranks, table, old, None, ())
    ordered, slot_order, restore = by_node(ranks)
    before = np.ascontiguousarray(old[:, slot_order])
    homes = homes_in_service(before, ordered, experts, num_groups)
    ranks, table = restore(
        move_limited(mean, ordered, before, tolerance, max_moves, replica_cap, homes)
    )
    return _result(windows, weights, ranks, table, old, 0.0, ())


def locality_curve(
    load, slots_per_rank, *, node_of_rank, num_groups, speed=None, window_weights=None
) -> tuple[LocalityPoint, ...]:
    """The trade-off between balance and load that leaves its home node, hierarchical plan first; arguments as for `plan`."""
    result = plan(
        load,
        slots_per_rank,
        node_of_rank=node_of_rank,
        num_groups=num_groups,
        speed=speed,
        window_weights=window_weights,
        locality="soft",
    )
    return result.locality_curve


def _weights(window_weights, num_windows: int) -> np.ndarray:
    if window_weights is None:
        return np.full(num_windows, 1.0 / num_windows)
    weights = np.asarray(window_weights, dtype=np.float64)
    if (
        weights.shape != (num_windows,)
        or not np.isfinite(weights).all()
        or weights.min() < 0
        or weights.sum() == 0
    ):
        raise PlacementError(
            f"window_weights {window_weights!r} for {num_windows} windows: give one weight of 0 or more per window"
        )
    return weights / weights.sum()


def _mean_load(windows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [layers, experts]: the windows' loads, each brought to the same total, by weight; the total is the tokens'."""
    if windows.shape[0] == 1:
        return windows[0]
    totals = windows.sum(axis=2, keepdims=True)
    shares = windows / np.where(totals > 0, totals, 1.0)
    return np.ascontiguousarray(np.tensordot(weights, shares, 1) * totals.sum(axis=0))


def _pool(windows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_WINDOWS` windows: consecutive ones are averaged by weight."""
    if windows.shape[0] <= MAX_WINDOWS:
        return windows, weights
    parts = np.array_split(np.arange(windows.shape[0]), MAX_WINDOWS)
    parts = [p for p in parts if weights[p].sum() > 0]
    pooled = np.stack([_mean_load(windows[p], weights[p] / weights[p].sum()) for p in parts])
    return pooled, np.array([weights[p].sum() for p in parts])


def _labels(ranks: Ranks) -> np.ndarray:
    """int64 [ranks]: equal for ranks that can be exchanged."""
    kinds = np.stack([np.diff(ranks.start), ranks.slowness], axis=1)
    return np.unique(kinds, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _relax(mean, ranks, homes, table, penalty, max_leaving):
    """The soft form: (plan, share of load leaving, curve)."""
    if not penalty >= 0:
        raise PlacementError(f"locality_penalty {penalty}: give 0 or more")
    if max_leaving is not None and not 0 <= max_leaving <= 1:
        raise PlacementError(f"max_leaving {max_leaving}: give a share of the load, 0 to 1")
    expert_home = np.repeat(homes, mean.shape[1] // homes.shape[1], axis=1)
    node_of_slot = ranks.node_of[ranks.rank_of]
    candidates = [(table, 0.0)]
    for target in LOCALITY_TARGETS:
        relaxed = table.copy()
        relax_layers(
            mean,
            expert_home,
            ranks.node_of,
            ranks.start,
            ranks.rank_of,
            ranks.slowness,
            ranks.total_slowness,
            target,
            relaxed,
        )
        candidates.append((relaxed, load_leaving(mean, relaxed, expert_home, node_of_slot)))
    curve = [
        LocalityPoint(_overall(mean[None], np.ones(1), ranks, t), leaving)
        for t, leaving in candidates
    ]
    best, best_cost = 0, np.inf
    for k, point in enumerate(curve):
        if max_leaving is not None and point.leaving > max_leaving:
            continue
        cost = 1.0 / point.balancedness + penalty * point.leaving
        if cost < best_cost:
            best, best_cost = k, cost
    return candidates[best][0], candidates[best][1], tuple(curve)


def _cluster(mean, coactivation, ranks, goal, allowance, table) -> None:
    layers, experts = mean.shape
    pairs = np.ascontiguousarray(coactivation, dtype=np.float64)
    if pairs.shape != (layers, experts, experts):
        raise PlacementError(
            f"coactivation of shape {pairs.shape}: it must be {(layers, experts, experts)} for this load"
        )
    if goal not in ("node", "rank", "spread"):
        raise PlacementError(f"coactivation_goal {goal!r}: choose node, rank or spread")
    if not allowance >= 0:
        raise PlacementError(f"coactivation_allowance {allowance}: give a fraction of 0 or more")
    part = ranks.node_of if goal == "node" else np.arange(ranks.num_ranks)
    if goal == "node" and ranks.num_nodes == 1:
        raise PlacementError(
            "coactivation_goal node with all ranks on one node: give node_of_rank, or the goal rank or spread"
        )
    cluster_layers(
        mean,
        pairs,
        part,
        ranks.start,
        ranks.rank_of,
        ranks.slowness,
        ranks.total_slowness,
        1.0 + allowance,
        -1.0 if goal == "spread" else 1.0,
        20,
        table,
    )


def _times(windows: np.ndarray, ranks: Ranks, table: np.ndarray) -> np.ndarray:
    times = np.empty(windows.shape[:2], np.float64)
    busiest_times(windows, table, ranks.start, ranks.inverse_speed, times)
    return times


def _ratio(means: np.ndarray, times: np.ndarray) -> np.ndarray:
    """means / times, 1 where there is no load."""
    return np.divide(means, times, out=np.ones_like(means), where=times > 0)


def _overall(windows: np.ndarray, weights: np.ndarray, ranks: Ranks, table: np.ndarray) -> float:
    scale = _window_scale(windows, weights)
    time = float(scale @ _times(windows, ranks, table).sum(axis=1))
    mean = float(scale @ windows.sum(axis=(1, 2))) / ranks.total_speed
    return mean / time if time > 0 else 1.0


def _window_scale(windows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [windows]: brings every window to its weight, whatever its tokens."""
    totals = windows.sum(axis=(1, 2))
    return np.divide(weights, totals, out=np.zeros_like(weights), where=totals > 0)


def _figures(windows, weights, ranks, table) -> Figures:
    scale = _window_scale(windows, weights)
    times = _times(windows, ranks, table)
    means = windows.sum(axis=2) / ranks.total_speed
    overall = _ratio(
        np.atleast_1d(scale @ means.sum(axis=1)), np.atleast_1d(scale @ times.sum(axis=1))
    )
    return Figures(
        _ratio(scale @ means, scale @ times),
        _ratio(means.sum(axis=1), times.sum(axis=1)),
        float(overall[0]),
    )


def _result(windows, weights, ranks, table, old, leaving, curve) -> Plan:
    moved = before = None
    if old is not None:
        moved = np.empty(table.shape[0], np.int64)
        moved_slots(old, table, ranks.start, moved)
        before = _overall(windows, weights, ranks, old)
    table.setflags(write=False)
    return Plan(
        physical_to_logical=table,
        measure=partial(_figures, windows, weights, ranks, table),
        overall_before=before,
        moved=moved,
        leaving=leaving,
        locality_curve=curve,
    )
