"""Experts placed, and replicated where there are redundant slots, by the load that was recorded."""

from __future__ import annotations

from ..errors import PlacementError
from ..placement import Placement
from .base import PlacementRequest, Strategy


class Eplb(Strategy):
    """The planner's placement: per layer the busiest rank is as light as the search finds it, over all windows of the load at once."""

    name = "eplb"
    needs_load = True

    def place(self, request: PlacementRequest) -> Placement:
        if request.load is None:
            raise PlacementError(
                "strategy eplb places experts by a recorded load and has none: give --expert-placement-file a recorded load "
                "or a plan, or choose zigzag or balanced"
            )
        from ..planner import plan  # numba is only paid for by those who plan

        found = plan(
            request.load.counts,
            request.slots_per_rank,
            node_of_rank=request.topology.node_of_rank,
            speed=request.topology.speed,
        )
        return self._placement(request, found.physical_to_logical)
