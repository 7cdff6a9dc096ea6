"""The placement that travels to other hosts: whole, small, and refused when it is neither."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.vllm.state import Carried
from moe_placement_plugin.formats import packed as form
from tests.support.vllm_settings import make_settings


def random_plan(layers: int, experts: int, redundant: int, ranks: int, seed: int = 0) -> Placement:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(layers):
        order = rng.permutation(experts)
        # The copies lie on the last ranks, far from the first.
        rows.append(np.concatenate([order, order[:redundant]]))
    slots = experts + redundant
    per_rank = [slots // ranks + (rank < slots % ranks) for rank in range(ranks)]
    return Placement(
        np.stack(rows), experts, tuple(per_rank), tuple(range(3, 3 + layers)), strategy="eplb"
    )


def test_r1_travels_whole_and_small():
    """58 layers of 288 slots, as random as a plan can be, are small enough for any config."""
    plan = random_plan(58, 256, 32, 32)
    packed = form.pack(plan)
    size = len(json.dumps(packed))
    print(f"R1, 58 x 288 slots: {size} bytes packed")
    assert size < 32_000 < form.LIMIT // 100
    there = form.unpack(json.loads(json.dumps(packed)))
    assert (
        there.digest == plan.digest
        and (there.physical_to_logical == plan.physical_to_logical).all()
    )
    assert len(pickle.dumps(dict(Carried(make_settings("eplb", plan, 32))))) < 33_000


def test_the_limit_is_far_beyond_any_model_of_today():
    """A hundred times R1's slots still travel."""
    plan = random_plan(580, 2560, 320, 10)
    assert len(json.dumps(form.pack(plan))) < form.LIMIT


def test_what_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(form, "LIMIT", 20_000)
    with pytest.raises(
        PlacementError, match=r"58 layers with 288 slots takes \d+ bytes packed, and 20000 travel"
    ):
        Carried(make_settings("eplb", random_plan(58, 256, 32, 32), 32))


def test_what_was_damaged_on_the_way_is_refused():
    packed = form.pack(random_plan(2, 16, 2, 3))
    for change in (
        {"slots_per_rank": [18]},
        {"digest": "0" * 64},
        {"physical_to_logical": "AAAA"},
        {"bytes_per_slot": 4},
    ):
        with pytest.raises(PlacementError):
            form.unpack(packed | change)
    with pytest.raises(PlacementError):
        form.unpack({key: value for key, value in packed.items() if key != "layer_ids"})


def test_nodes_travel_with_the_plan():
    plan = random_plan(2, 16, 2, 3)
    plan = replace(plan, metadata={"node_of_rank": [0, 0, 1]})
    assert form.unpack(form.pack(plan)).metadata["node_of_rank"] == [0, 0, 1]
