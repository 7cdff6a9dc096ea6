"""Check the comparison of two placements."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin import Placement, PlacementError
from moe_placement_plugin.core.diff import compare, expert_bytes_of


def test_moves():
    old = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, (2, 2))
    new = Placement(np.array([[1, 0, 2, 3], [0, 2, 1, 3]]), 4, (2, 2))
    moves = compare(old, new)
    # A swap within a rank crosses nothing; a swap across ranks crosses twice.
    assert moves.received.tolist() == [[0, 0], [1, 1]] and moves.changed_slots.tolist() == [2, 2]
    assert moves.total == 2 and moves.share == 0.25
    assert moves.bytes(10) == 20 and moves.seconds(10, 5.0) == 2.0
    assert compare(old, old).total == 0


def test_expert_bytes():
    r1 = {
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "quantization_config": {"quant_method": "fp8"},
    }
    assert expert_bytes_of(r1, "R1") == 3 * 7168 * 2048
    with pytest.raises(PlacementError, match="--expert-bytes"):
        expert_bytes_of({"hidden_size": 8}, "x")
