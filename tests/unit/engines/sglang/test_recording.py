"""Test what the flags of a recording are refused for."""

from __future__ import annotations

import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.engines.sglang import flags


@pytest.mark.parametrize(
    "values, words",
    [
        ({"expert_load_interval": "5"}, "without --expert-load-record"),
        ({"expert_load_record": "/no/such/folder/load"}, "does not exist"),
        (
            {"expert_load_record": "load", "expert_load_interval": "soon"},
            "--expert-load-interval soon",
        ),
    ],
)
def test_bad_flags(values, words):
    with pytest.raises(PlacementError, match=words):
        flags.read_request(dict(values))
    assert flags.read_request({"tp_size": 2}) is None
