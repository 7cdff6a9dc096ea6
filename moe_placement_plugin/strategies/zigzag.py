"""Deal experts to the ranks in turn."""

from __future__ import annotations

import numpy as np

from ..core.placement import Placement
from ..core.tables import least_copied
from .base import PlacementRequest, Strategy


class Zigzag(Strategy):
    """Put expert e on rank e mod ranks, which spreads each group over all ranks (vLLM PR 23745).

    A rank that is full is passed over, so that uneven slots work too. Redundant slots take the
    expert with the fewest copies that the rank does not hold yet, lowest id first.
    """

    name = "zigzag"

    def place(self, request: PlacementRequest) -> Placement:
        ranks = request.topology.num_ranks
        held: list[list[int]] = [[] for _ in range(ranks)]
        rank = 0
        for expert in range(request.num_experts):
            while len(held[rank]) >= request.slots_per_rank[rank]:
                rank = (rank + 1) % ranks
            held[rank].append(expert)
            rank = (rank + 1) % ranks
        copies = np.ones(request.num_experts, dtype=np.int64)
        while any(len(h) < s for h, s in zip(held, request.slots_per_rank)):
            for r in range(ranks):
                if len(held[r]) < request.slots_per_rank[r]:
                    expert = least_copied(copies, held[r])
                    held[r].append(expert)
                    copies[expert] += 1
        return self._placement(request, np.array([e for h in held for e in h], dtype=np.int32))
