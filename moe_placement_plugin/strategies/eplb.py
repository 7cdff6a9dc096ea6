"""Place experts, and replicate them in redundant slots, by the load that was recorded."""

from __future__ import annotations

from typing import Any

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from .base import PlacementRequest, Strategy


class Eplb(Strategy):
    """Ask the planner, which makes the busiest rank of each layer as light as its search finds."""

    name = "eplb"
    needs_load = True

    def place(self, request: PlacementRequest) -> Placement:
        """Place experts for all windows of the load at once."""
        if request.load is None:
            raise PlacementError(
                "strategy eplb places experts by a recorded load and has none: give "
                "--expert-placement-file a recorded load or a plan, or choose zigzag or balanced"
            )
        from ..planner.api import plan  # lazy: numba

        planned = plan(
            request.load.counts,
            request.slots_per_rank,
            node_of_rank=request.topology.node_of_rank,
            speed=request.topology.speed,
            **_locality_arguments(request, request.load),
        )
        return self._placement(request, planned.physical_to_logical)


def _locality_arguments(request: PlacementRequest, load: ExpertLoad) -> dict[str, Any]:
    """Give the planner's arguments for `PlacementRequest.locality`."""
    if request.locality == "none":
        return {}
    nodes, groups, pairs = request.topology.num_nodes, request.num_groups, load.coactivation
    if nodes == 1:
        raise PlacementError(
            f"locality {request.locality} with all {request.topology.num_ranks} EP ranks on one "
            "node: leave it out"
        )
    if request.locality == "soft" and pairs is not None and groups == 1:
        return {"coactivation": pairs, "coactivation_goal": "node"}
    if groups % nodes or groups < nodes:
        raise PlacementError(
            f"locality {request.locality}: {groups} expert groups do not divide over {nodes} nodes"
            + (
                "; soft also takes a load with co-activation (--expert-load-coactivation)"
                if request.locality == "soft"
                else ""
            )
            + "; leave it out, or use another number of nodes"
        )
    return {"num_groups": groups, "locality": request.locality}
