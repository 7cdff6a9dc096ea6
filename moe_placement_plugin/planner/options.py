"""Name what callers of the planner may choose; importing this loads no numba and no kernel."""

from __future__ import annotations

from dataclasses import dataclass

LOCALITIES = ("none", "node", "soft")
"""How a plan treats nodes: not at all, groups stay on one, load may leave its own at a price."""

REPLAN_LOCALITIES = LOCALITIES[:2]
"""Those that a plan with few moves takes."""

COACTIVATION_GOALS = ("node", "rank", "spread")
"""Where experts that tokens choose together go: on one node, on one rank, on different ranks."""

MAX_WINDOWS = 16
"""More windows than this are pooled: consecutive ones are averaged."""

REPLAN_TOLERANCE = 0.01
"""A rebalance leaves a layer alone within this fraction of its lower bound."""

REPLICA_CAP = 1.3
"""Largest replica of a plan with few moves over a fresh one's: above it the next window suffers."""


@dataclass(frozen=True)
class Effort:
    """Say how long the planner searches.

    Attributes:
        swaps_per_rank: quick hot-to-cold swaps per rank and layer.
        kicks: restarts of the thorough search per layer that is not at its bound yet; -1: no
            thorough search.
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


@dataclass(frozen=True)
class Nearness:
    """Say how a plan keeps groups of experts on nodes.

    Attributes:
        locality: one of `LOCALITIES`.
        num_groups: groups of consecutive experts.
        penalty: soft form: what the share of load that leaves its node costs, against the busiest
            rank's excess over the mean.
        max_leaving: soft form: largest share of load that may leave, 0..1; None for no limit.
    """

    locality: str
    num_groups: int
    penalty: float
    max_leaving: float | None


@dataclass(frozen=True)
class MoveBudget:
    """Say how far a plan may go from the placement in service.

    Attributes:
        max_moves: slots that may change rank, over all layers; None for no limit.
        tolerance: fraction above its lower bound at which a layer is left alone.
        replica_cap: largest replica over the largest of a fresh plan.
    """

    max_moves: int | None = None
    tolerance: float = REPLAN_TOLERANCE
    replica_cap: float = REPLICA_CAP
