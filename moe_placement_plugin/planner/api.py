"""Plan: `plan` from nothing, `replan` from the placement in service."""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import ArrayLike

from ..core.errors import PlacementError
from .arguments import as_budget, as_old, as_ranks, as_windows, check_fits
from .figures import Windows, measured
from .fresh.plan import fresh_plan
from .fresh.windows import plan_windows
from .kernels.align import align
from .kernels.state import Ranks, SearchLimits
from .limited.budget import move_limited
from .nodes.coactivation import Coactivation, cluster
from .nodes.fixed_groups import homes_in_service
from .nodes.groups import group_homes, hierarchical_plan
from .nodes.order import by_node
from .nodes.soft import soft_plan
from .options import (
    EFFORTS,
    LOCALITIES,
    MAX_WINDOWS,
    REPLAN_LOCALITIES,
    REPLAN_TOLERANCE,
    REPLICA_CAP,
    Effort,
    MoveBudget,
    Nearness,
)
from .result import Draft, LocalityPoint, Plan


def plan(
    load: ArrayLike,
    slots_per_rank: ArrayLike,
    *,
    node_of_rank: ArrayLike | None = None,
    speed: ArrayLike | None = None,
    num_groups: int = 1,
    locality: str = "none",
    locality_penalty: float = 1.0,
    max_leaving: float | None = None,
    coactivation: ArrayLike | None = None,
    coactivation_goal: str = "node",
    coactivation_allowance: float = 0.05,
    window_weights: ArrayLike | None = None,
    old: ArrayLike | None = None,
    mode: str = "best",
) -> Plan:
    """Place every expert of every layer for a load.

    Replication, packing and swaps follow DeepSeek's EPLB in their first step and search on from
    there; see docs/planner.md.

    Args:
        load: token counts, int or float [windows, layers, experts] or [layers, experts]. With
            several windows (or workloads) the weighted sum over windows of the busiest rank's time
            is minimised; more than `MAX_WINDOWS` are pooled.
        slots_per_rank: int [ranks], at least as many in all as experts; 0 for a rank that is down.
        node_of_rank: int [ranks]; all on one node when left out.
        speed: float [ranks], relative speeds; equal when left out.
        num_groups: groups of consecutive experts, for `locality`.
        locality: "none"; "node": all experts of a group stay on one node (hierarchical); "soft":
            load may leave the home node of its group at a price. Both use the windows' weighted
            mean load.
        locality_penalty: soft form: what the share of load that leaves costs, against the busiest
            rank's excess over the mean.
        max_leaving: soft form: largest share of load that may leave, 0..1.
        coactivation: float [layers, experts, experts], tokens that chose both experts: exchanges
            raise (or lower) it as below.
        coactivation_goal: "node": chosen together, together on a node; "rank": the same for ranks;
            "spread": apart, on different ranks.
        coactivation_allowance: how far above the mean the busiest rank may get for that, as a
            fraction.
        window_weights: float [windows]: what each window counts for; equal when left out, whatever
            the number of its tokens.
        old: int [layers, slots], the placement in service: the plan is the same, but ranks are
            relabelled and slots ordered so that least of it moves. To plan for few moves use
            `replan`.
        mode: "fast" (under a millisecond for 58 layers of 256 experts), "best" or "thorough".

    Raises:
        PlacementError: when an argument cannot be honoured.
    """
    if mode not in EFFORTS:
        raise PlacementError(f"planner mode {mode!r}: choose one of {', '.join(EFFORTS)}")
    if locality not in LOCALITIES:
        raise PlacementError(f"locality {locality!r}: choose none, node or soft")
    windows = as_windows(load, window_weights)
    ranks = as_ranks(slots_per_rank, node_of_rank, speed)
    check_fits(windows.shape[1], ranks)
    near = Nearness(locality, num_groups, locality_penalty, max_leaving)
    mean = windows.mean()
    if locality != "none" and ranks.num_nodes > 1:
        draft = _plan_near(mean, ranks, near, EFFORTS[mode])
    else:
        draft = Draft(_plan_anywhere(windows, mean, ranks, EFFORTS[mode]))
    if coactivation is not None:
        wish = Coactivation(coactivation, coactivation_goal, coactivation_allowance)
        cluster(mean, ranks, wish, draft.table)
    before = None if old is None else as_old(old, windows.shape, ranks)
    if before is not None:
        align(before, draft.table, ranks, keep_nodes=locality != "none")
    return measured(windows, ranks, draft, before)


def replan(
    load: ArrayLike,
    old: ArrayLike,
    slots_per_rank: ArrayLike,
    *,
    node_of_rank: ArrayLike | None = None,
    speed: ArrayLike | None = None,
    num_groups: int = 1,
    locality: str = "none",
    max_moves: int | None = None,
    max_bytes: int | None = None,
    bytes_per_expert: int | None = None,
    tolerance: float = REPLAN_TOLERANCE,
    replica_cap: float = REPLICA_CAP,
    window_weights: ArrayLike | None = None,
) -> Plan:
    """Improve the placement in service with few moves.

    Layers are brought to within `tolerance` of the lower bound of their busiest rank. If that takes
    more than the budget the moves go where they lower the busiest ranks most. Slots that keep their
    expert are untouched.

    With `locality="node"` every group of experts stays on the node that it is on: moves are within
    nodes, and a layer is done when its busiest node is within `tolerance` of what its groups allow.
    Groups change nodes only in `plan`.

    Args:
        load: as for `plan`; several windows count by their weighted mean.
        old: int [layers, slots], the placement in service.
        slots_per_rank: as for `plan`.
        node_of_rank: as for `plan`.
        speed: as for `plan`.
        num_groups: as for `plan`.
        locality: "none", or "node".
        max_moves: slots that may change rank, over all layers; None for no limit.
        max_bytes: the same limit in bytes.
        bytes_per_expert: bytes of one expert of one layer.
        tolerance: fraction above the lower bound at which a layer is left alone.
        replica_cap: largest replica, over the largest of a fresh plan; without a cap the next
            window loses 1-2 points.
        window_weights: as for `plan`.

    Raises:
        PlacementError: when an argument cannot be honoured.
    """
    windows = as_windows(load, window_weights)
    ranks = as_ranks(slots_per_rank, node_of_rank, speed)
    check_fits(windows.shape[1], ranks)
    if locality not in REPLAN_LOCALITIES:
        raise PlacementError(f"locality {locality!r}: a plan with few moves takes none or node")
    before = as_old(old, windows.shape, ranks)
    asked = MoveBudget(max_moves, tolerance, replica_cap)
    budget = as_budget(asked, max_bytes, bytes_per_expert)
    if locality == "none" or ranks.num_nodes == 1:
        draft = Draft(move_limited(windows.mean(), ranks, before, budget))
    else:
        draft = Draft(_replan_near(windows.mean(), ranks, before, budget, num_groups), leaving=0.0)
    return measured(windows, ranks, draft, before)


def locality_curve(
    load: ArrayLike,
    slots_per_rank: ArrayLike,
    *,
    node_of_rank: ArrayLike,
    num_groups: int,
    speed: ArrayLike | None = None,
    window_weights: ArrayLike | None = None,
) -> tuple[LocalityPoint, ...]:
    """Return the trade-off between balance and load that leaves its home node.

    The hierarchical plan comes first. Arguments are those of `plan`.
    """
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


def _limits(effort: Effort, experts: int, ranks: Ranks) -> SearchLimits:
    """Return how long a search of this effort goes on for one load."""
    single = ranks.num_slots == experts
    return SearchLimits(
        tolerance=effort.tolerance_single if single else effort.tolerance,
        max_swaps=ceil(effort.swaps_per_rank * ranks.num_ranks),
        kicks=effort.kicks_single if single else effort.kicks,
    )


def _plan_anywhere(windows: Windows, mean: np.ndarray, ranks: Ranks, effort: Effort) -> np.ndarray:
    """Plan without a look at nodes; return the table, int32 [layers, slots]."""
    limits = _limits(effort, windows.shape[1], ranks)
    if windows.load.shape[0] == 1:
        return fresh_plan(mean, ranks, limits)
    table = fresh_plan(mean, ranks, limits._replace(kicks=min(limits.kicks, 0)))
    if effort.window_kicks >= 0:
        pooled = windows.pooled(MAX_WINDOWS)
        limits = limits._replace(kicks=effort.window_kicks)
        plan_windows(pooled.load, pooled.weights, ranks, ranks.total_slowness, limits, table)
    return table


def _plan_near(mean: np.ndarray, ranks: Ranks, near: Nearness, effort: Effort) -> Draft:
    """Plan for groups that stay on nodes, or leave them at a price."""
    order = by_node(ranks)
    limits = _limits(effort, mean.shape[1], ranks)
    homes, _ = group_homes(mean, order.ranks, near.num_groups)
    draft = Draft(hierarchical_plan(mean, order.ranks, homes, limits), leaving=0.0)
    if near.locality == "soft":
        draft = soft_plan(mean, order.ranks, homes, draft.table, near)
    return draft._replace(table=order.restore(draft.table))


def _replan_near(
    mean: np.ndarray, ranks: Ranks, old: np.ndarray, budget: MoveBudget, num_groups: int
) -> np.ndarray:
    """Replan for groups that stay where they are; return the table, int32 [layers, slots]."""
    order = by_node(ranks)
    before = order.sort(old)
    homes = homes_in_service(before, order.ranks, mean.shape[1], num_groups)
    return order.restore(move_limited(mean, order.ranks, before, budget, homes))
