"""Generate placements for hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moe_placement_plugin.core.placement import Placement


@st.composite
def placements(draw) -> Placement:
    """Draw a valid placement: uneven ranks, some empty, replicas, layers numbered with gaps."""
    experts = draw(st.integers(1, 12))
    ranks = draw(st.integers(1, 5))
    layers = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Each expert on one random rank, then some more copies on ranks that lack it.
    shape = None
    rows = []
    for _ in range(layers):
        if shape is None:
            held = [set() for _ in range(ranks)]
            for expert in range(experts):
                held[rng.integers(ranks)].add(expert)
            for _ in range(draw(st.integers(0, 6))):
                expert, rank = int(rng.integers(experts)), int(rng.integers(ranks))
                held[rank].add(expert)
            shape = [len(h) for h in held]
            renamed = np.arange(experts)
        else:
            renamed = rng.permutation(experts)
        rows.append([int(renamed[e]) for h in held for e in rng.permutation(sorted(h))])
    ids = sorted(rng.choice(20, size=layers, replace=False).tolist())
    return Placement(
        rows, experts, tuple(shape), tuple(ids), strategy="random", metadata={"seed": 1}
    )
