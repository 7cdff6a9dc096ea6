"""Check that bad input is refused by name, rule and mend."""

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.planner import plan, replan

LOAD = np.ones((2, 8), np.int64)
OLD = np.tile(np.arange(8), (2, 1))


@pytest.mark.parametrize(
    ("load", "slots", "more", "text"),
    [
        (LOAD, [4, 3], {}, "7 slots for 8 experts"),
        (LOAD, [0, 0], {}, "at least one rank"),
        (LOAD, [4.5, 4], {}, "whole number per rank"),
        (LOAD, [-1, 9], {}, "whole number per rank"),
        (LOAD[0], [4, 4], {}, "must be \\[windows, layers, experts\\]"),
        (-LOAD, [4, 4], {}, "not negative"),
        (np.full((1, 8), np.nan), [4, 4], {}, "finite"),
        (np.full((1, 8), np.inf), [4, 4], {}, "finite"),
        (LOAD.astype(str), [4, 4], {}, "integers or floats"),
        (np.ones((1, 5000)), [2500, 2500], {}, "at most 4096"),
        (LOAD, [4, 4], {"speed": [1, 0]}, "positive relative speed"),
        (LOAD, [4, 4], {"node_of_rank": [0]}, "node of each of the 2 ranks"),
        (LOAD, [4, 4], {"mode": "quick"}, "choose one of fast, best, thorough"),
        (LOAD, [4, 4], {"locality": "rack"}, "choose none, node or soft"),
        (LOAD, [4, 4], {"locality": "node", "node_of_rank": [0, 1], "num_groups": 3}, "equal size"),
        (
            LOAD,
            [4, 4],
            {"locality": "node", "node_of_rank": [0, 1], "num_groups": 1},
            "do not fit whole",
        ),
        (LOAD, [4, 4], {"window_weights": [1, 2]}, "one weight of 0 or more per window"),
        (LOAD, [4, 4], {"coactivation": np.ones((2, 8, 7))}, "it must be \\(2, 8, 8\\)"),
        (LOAD, [4, 4], {"coactivation": np.ones((2, 8, 8))}, "give node_of_rank"),
        (LOAD, [4, 4], {"old": OLD[:, :7]}, "give the one in service"),
    ],
)
def test_plan_refuses(load, slots, more, text):
    with pytest.raises(PlacementError, match=text):
        plan(load, slots, **more)


@pytest.mark.parametrize(
    ("old", "more", "text"),
    [
        (OLD * 0, {}, "without expert 1 in layer 0"),
        (OLD + 1, {}, "numbered 0 to 7"),
        (OLD, {"max_moves": -1}, "max_moves -1"),
        (OLD, {"max_bytes": 10}, "bytes_per_expert"),
        (OLD, {"tolerance": 0}, "positive fraction"),
        (OLD, {"replica_cap": 0.5}, "give 1 or more"),
        (OLD, {"locality": "soft"}, "takes none or node"),
        (OLD, {"locality": "node", "node_of_rank": [0, 1], "num_groups": 3}, "equal size"),
    ],
)
def test_replan_refuses(old, more, text):
    with pytest.raises(PlacementError, match=text):
        replan(LOAD, old, [4, 4], **more)
