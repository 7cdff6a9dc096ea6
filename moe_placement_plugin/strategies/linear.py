"""Place experts as the engines do by themselves: in contiguous blocks."""

from __future__ import annotations

import numpy as np

from ..core.placement import Placement
from .base import PlacementRequest, Strategy


def contiguous_table(request: PlacementRequest) -> np.ndarray:
    """List the experts in order, redundant ones repeating them from 0, int32 ``[slots]``.

    vLLM's EPLB begins so. A copy that would meet its expert on the same rank gives way to the next
    expert that does not.
    """
    experts = request.num_experts
    table = np.arange(request.num_slots, dtype=np.int32) % experts
    offset = 0
    for size in request.slots_per_rank:
        block = table[offset : offset + size]
        for index in range(size):
            while offset + index >= experts and block[index] in block[:index]:
                block[index] = (block[index] + 1) % experts
        offset += size
    return table


class Linear(Strategy):
    """Give ranks contiguous blocks of experts, one after the other."""

    name = "linear"

    def place(self, request: PlacementRequest) -> Placement:
        return self._placement(request, contiguous_table(request))
