"""Check what a simulation says of strategies on loads made for it."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Topology, get_strategy
from moe_placement_plugin.simulation.cluster import Cluster, Workload
from moe_placement_plugin.simulation.simulate import simulate
from tests.support.loads import skewed


def test_simulation_judges_on_the_next_window():
    quiet, moved = np.full((2, 8), 10), np.full((2, 8), 10)
    quiet[:, 0] = 1000
    moved[:, 5] = 1000
    load = ExpertLoad(np.stack([quiet, moved, quiet]).astype(np.int64))
    found = simulate(
        [Workload("w", load)],
        {n: get_strategy(n) for n in ("linear", "eplb")},
        Cluster(Topology(4), 4),
    )
    eplb = found.outcomes[1]
    # Window 0's plan replicates expert 0; on window 1, where expert 5 is hot, it cannot be
    # balanced.
    assert eplb.next_window < 0.6 < eplb.overall
    assert found.best is eplb and found.outcomes[0].next_window == pytest.approx(
        found.outcomes[0].overall, rel=0.2
    )


def test_served_matrix_is_best_where_planned():
    a, b = skewed(1, seed=1), ExpertLoad(skewed(1, seed=2).counts[..., ::-1].copy())
    found = simulate(
        [Workload("a", a), Workload("b", b)],
        {"eplb": get_strategy("eplb")},
        Cluster(Topology(4), 4),
    )
    served = found.outcomes[0].served
    assert served[0, 0] > served[0, 1] and served[1, 1] > served[1, 0]


def test_verdict_says_when_balance_buys_nothing():
    even = ExpertLoad(np.full((1, 2, 16), 100, dtype=np.int64), phases=("decode",))
    found = simulate(
        [Workload("w", even)],
        {n: get_strategy(n) for n in ("linear", "zigzag")},
        Cluster(Topology(4)),
    )
    text = " ".join(found.verdict())
    assert "leave the placement as it is" in text and "Dead zone" in text and "calibration" in text
    skew = simulate(
        [Workload("w", skewed(phases=("decode",) * 3))],
        {n: get_strategy(n) for n in ("linear", "eplb")},
        Cluster(Topology(4), 4),
    )
    text = " ".join(skew.verdict())
    assert "eplb lowers" in text and "Dead zone" not in text
