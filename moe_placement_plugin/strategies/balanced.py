"""Place experts in contiguous blocks whose sizes differ by at most one."""

from __future__ import annotations

from dataclasses import replace

from ..core.placement import Placement, even_slots
from .base import PlacementRequest, Strategy
from .linear import contiguous_table


class Balanced(Strategy):
    """Give ranks contiguous blocks, 30 experts on 8 being 4 4 4 4 4 4 3 3 (vLLM PR 21497)."""

    name = "balanced"

    def place(self, request: PlacementRequest) -> Placement:
        """Place experts; slots that were asked for rank by rank are dealt out anew."""
        even = replace(
            request, slots_per_rank=even_slots(request.num_slots, request.topology.num_ranks)
        )
        return self._placement(even, contiguous_table(even))
