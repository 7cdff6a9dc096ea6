"""Make loads that tests of several folders plan from."""

from __future__ import annotations

import numpy as np

from moe_placement_plugin import ExpertLoad


def skewed(
    windows: int = 3, layers: int = 4, experts: int = 16, seed: int = 0, **kwargs
) -> ExpertLoad:
    """Draw a load whose first experts are hot, slightly different in every window."""
    rng = np.random.default_rng(seed)
    shape = 1 / np.arange(1, experts + 1)
    counts = rng.poisson(1000 * shape * rng.uniform(0.8, 1.2, (windows, layers, experts)))
    return ExpertLoad(counts.astype(np.int64), **kwargs)
