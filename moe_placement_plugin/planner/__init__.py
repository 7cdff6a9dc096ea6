"""Where experts should lie: the planner behind the `eplb` strategy.

numpy in, numpy out; single-threaded kernels compiled by numba on first use and cached on disk.

- `plan`: a placement for a load, from nothing: one or several windows, flat or with nodes, with co-activation.
- `replan`: a better placement than the one in service, with few moves.
- `locality_curve`: balance against load that leaves its home node.
"""

from .api import EFFORTS, MAX_WINDOWS, REPLAN_TOLERANCE, locality_curve, plan, replan
from .nodes.coactivation import coactivation_of, crossings_per_token
from .result import LocalityPoint, Plan

__all__ = [
    "EFFORTS",
    "MAX_WINDOWS",
    "REPLAN_TOLERANCE",
    "LocalityPoint",
    "Plan",
    "coactivation_of",
    "crossings_per_token",
    "locality_curve",
    "plan",
    "replan",
]
