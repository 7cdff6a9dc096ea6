"""Compute a MoE layer in stages that one can see through: route, gmm_up, gmm_down, unroute.

For verification, measurement and overlap of exchange with computation; it needs torch. The stages
and their typed results follow MaxText PR 3981. ``docs/moe.md`` says what is guaranteed.
"""

from .collectives import EpGroup
from .dispatching import dispatch, plan_dispatch
from .layer import StagedMoE
from .matmuls import find_matmuls
from .placed import PlacedExperts
from .results import ExpertHidden, RouteMetadata, RouteOutput, Selection
from .select import Routing, select_experts
from .stages import EpExchange, gmm_down, gmm_up, route, unroute
from .weights import ExpertWeights, SharedExperts

__all__ = [
    "EpExchange",
    "EpGroup",
    "ExpertHidden",
    "ExpertWeights",
    "PlacedExperts",
    "RouteMetadata",
    "RouteOutput",
    "Routing",
    "Selection",
    "SharedExperts",
    "StagedMoE",
    "dispatch",
    "find_matmuls",
    "gmm_down",
    "gmm_up",
    "plan_dispatch",
    "route",
    "select_experts",
    "unroute",
]
