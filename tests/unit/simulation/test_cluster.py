"""Check that loads of one model are put on the same layers."""

from __future__ import annotations

import numpy as np

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.simulation.cluster import Workload, align


def test_align_keeps_layers_that_any_workload_used():
    a, b = np.zeros((1, 3, 4), np.int64), np.zeros((1, 3, 4), np.int64)
    a[0, 1], b[0, 2] = 1, 1
    aligned = align([Workload("a", ExpertLoad(a)), Workload("b", ExpertLoad(b))])
    assert [w.load.layer_ids for w in aligned] == [(1, 2), (1, 2)]
