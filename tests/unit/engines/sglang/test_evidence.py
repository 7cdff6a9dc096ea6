"""Test what counts as evidence that a slot was filled by the map in force.

Also test what is refused for want of it.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import evidence, loading
from moe_placement_plugin.engines.sglang.state import STATE
from tests.support.sglang_settings import make_settings


class Weights(torch.nn.Module):
    """Stand in for a ``FusedMoE`` of layer 1, rank 1 of 2, with three slots.

    It has as much as loaders and checks look at.
    """

    def __init__(self, names=("w13_weight", "w2_weight"), biases=False, with_bias=False):
        super().__init__()
        self.layer_id, self._num_local_routed, self.moe_ep_rank = 1, 3, 1
        self.with_bias = with_bias
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(3, 2, 2)))
            if biases:
                self.register_parameter(f"{name}_bias", torch.nn.Parameter(torch.zeros(3, 2)))
        self.register_parameter("w2_weight_scale", torch.nn.Parameter(torch.zeros(3, 1)))
        evidence.note_built(self)


@pytest.fixture(autouse=True)
def placed():
    """Put a placement of 4 experts in 6 slots on 2 ranks for layer 1 into force in this process.

    Rank 1 holds 2, 0 and 3.
    """
    placement = Placement([[3, 1, 0, 2, 0, 3]], 4, (3, 3), (1,))
    STATE.settings = make_settings("custom", placement)
    evidence.forget()
    yield placement
    STATE.settings = None
    evidence.forget()


def load(layer, weight, shard, experts=range(4), leave_out=(), slot_of=None):
    """Load a tensor per expert as SGLang's loader does.

    It goes by the map in force unless ``slot_of`` says otherwise.
    """
    held = evidence.experts_of_slots(layer).tolist()

    def by_the_map(self, param, loaded, name, shard, expert):
        slots = (
            [s for s, e in enumerate(held) if e == expert] if slot_of is None else slot_of(expert)
        )
        for slot in slots:
            if slot not in leave_out:
                loading.fill(lambda *_: None, self, param, loaded, name, shard, slot)

    param = getattr(layer, weight)
    for expert in experts:
        loading.load(by_the_map, layer, param, None, f"mlp.experts.{weight}", shard, expert)


def whole(layer, **changes):
    for weight, shard in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
        load(layer, weight, shard, **changes)


BIASES = (("w13_weight_bias", "w1"), ("w13_weight_bias", "w3"), ("w2_weight_bias", "w2"))


def test_a_layer_with_biases_passes_when_they_came():
    layer = Weights(biases=True, with_bias=True)
    whole(layer)
    for weight, shard in BIASES:
        load(layer, weight, shard)
    evidence.check("mlp", layer)


@pytest.mark.parametrize("weight", ["w13_weight_bias", "w2_weight_bias"])
def test_biases_that_the_checkpoint_lacks_are_noticed(weight):
    """Notice a lacking bias, though its weight came.

    A bias comes under the shard of its weight, which is no evidence of the bias.
    """
    layer = Weights(biases=True, with_bias=True)
    whole(layer)
    for other, shard in BIASES:
        if other != weight:
            load(layer, other, shard)
    with pytest.raises(PlacementError, match=f"mlp: the checkpoint brought no {weight}.* rank 1"):
        evidence.check("mlp", layer)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"experts": range(3)}, "brought w2's bias of 3 of 4 experts, expert 3 is missing"),
        ({"leave_out": (1,)}, "nothing filled slot 1 of rank 1 with w2's bias of expert 0"),
        ({"slot_of": lambda expert: []}, "nothing was seen to fill w2_weight_bias of the slots"),
    ],
)
def test_a_bias_that_is_not_there_for_every_slot_is_noticed(fault, message):
    layer = Weights(biases=True, with_bias=True)
    whole(layer)
    for weight, shard in BIASES:
        load(layer, weight, shard, **(fault if shard == "w2" else {}))
    with pytest.raises(PlacementError, match=message):
        evidence.check("mlp", layer)


@pytest.mark.parametrize("biases", [False, True])
def test_a_model_without_biases_needs_none(biases):
    """Pass MXFP4 layers, which have bias parameters, of zeros, for models without biases too."""
    layer = Weights(biases=biases)
    whole(layer)
    evidence.check("mlp", layer)


def test_a_layer_that_was_filled_by_the_map_passes():
    layer = Weights()
    whole(layer)
    evidence.check("mlp", layer)


def test_a_layer_of_which_nothing_was_seen_is_refused():
    with pytest.raises(PlacementError, match="mlp: its weights did not come through FusedMoE's"):
        evidence.check("mlp", Weights())


def test_a_weight_of_which_nothing_was_seen_is_refused():
    """Refuse a loader that brings w13 by the map and copies w2 by position, past ``FusedMoE``."""
    layer = Weights()
    for shard in ("w1", "w3"):
        load(layer, "w13_weight", shard)
    with pytest.raises(PlacementError, match="nothing was seen to fill w2_weight .* rank 1"):
        evidence.check("mlp", layer)


def test_half_of_a_weight_is_refused_unless_the_layer_has_no_gate():
    layer = Weights()
    load(layer, "w13_weight", "w1")
    load(layer, "w2_weight", "w2")
    with pytest.raises(PlacementError, match="nothing but w1 was seen to fill w13_weight"):
        evidence.check("mlp", layer)
    object.__setattr__(layer, "moe_runner_config", types.SimpleNamespace(is_gated=False))
    evidence.check("mlp", layer)


def test_an_expert_that_the_checkpoint_lacks_is_noticed():
    layer = Weights()
    whole(layer, experts=range(3))
    with pytest.raises(PlacementError, match="w1 of 3 of 4 experts, expert 3 is missing"):
        evidence.check("mlp", layer)


def test_a_slot_that_nothing_filled_is_noticed():
    layer = Weights()
    whole(layer, leave_out=(1,))
    with pytest.raises(
        PlacementError,
        match="mlp: nothing filled slot 1 of rank 1 with w1 of expert 0: a loader went round",
    ):
        evidence.check("mlp", layer)
    whole(layer)
    evidence.check("mlp", layer)


def test_a_scale_may_be_left_to_its_default():
    layer = Weights()
    whole(layer)
    load(layer, "w2_weight_scale", "w2", experts=(3,))
    evidence.check("mlp", layer)


def test_an_expert_in_another_ones_slot_is_refused_before_it_is_written():
    layer = Weights()
    with pytest.raises(
        PlacementError, match="puts w1 of expert 0 into slot 0 of rank 1, which holds expert 2"
    ):
        load(layer, "w13_weight", "w1", slot_of=lambda expert: [expert])


def test_slots_that_were_filled_past_the_map_are_no_evidence():
    layer = Weights()
    for expert in range(4):
        for weight, shard in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
            loading.load(lambda *_: None, layer, None, None, weight, shard, expert)
    for weight, shard in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
        for slot in range(3):  # the loader has called what writes a slot by itself
            loading.fill(lambda *_: None, layer, getattr(layer, weight), None, weight, shard, slot)
    with pytest.raises(PlacementError, match="nothing was seen to fill w13_weight"):
        evidence.check("mlp", layer)


def test_the_map_in_force_counts_not_that_of_the_start(monkeypatch):
    layer = Weights()
    table = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 1, 3, 0]])
    now = types.SimpleNamespace(
        physical_to_logical_map_cpu=table, num_layers=2, num_logical_experts=4
    )
    monkeypatch.setattr(evidence, "in_force", lambda: now)
    assert evidence.experts_of_slots(layer).tolist() == [1, 3, 0]
    whole(layer)
    evidence.check("mlp", layer)


def load_draft(layer, experts=range(5), leave_out=()):
    """Load by a draft's own order: expert e in physical slot e.

    Rank 1 has the slots from 3 on.
    """
    for weight, shard in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
        load(layer, weight, shard, experts, leave_out, lambda e: [e - 3] if e > 2 else [])


def test_a_draft_is_loaded_by_its_own_order():
    """Load layers that SGLang's map is not for, as SGLang says from 0.5.23 on.

    Slots beyond the draft's experts may stay empty.
    """
    layer = Weights()
    object.__setattr__(layer, "uses_expert_location", False)
    assert evidence.experts_of_slots(layer).tolist() == [3, 4, 5]
    load_draft(layer)
    evidence.check("mlp", layer)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"leave_out": (1,)}, "nothing filled slot 1 of rank 1 with w1 of expert 4"),
        ({"experts": (0, 1, 3, 4)}, "w1 of 4 of 5 experts, expert 2 is missing"),
    ],
)
def test_a_draft_that_was_not_filled_is_noticed(fault, message):
    layer = Weights()
    object.__setattr__(layer, "uses_expert_location", False)
    load_draft(layer, **fault)
    with pytest.raises(PlacementError, match=message):
        evidence.check("mlp", layer)


def test_a_gguf_file_is_refused_by_name():
    layer, param = Weights(), torch.nn.UninitializedParameter()
    param.is_gguf_weight = True
    with pytest.raises(PlacementError, match="layer 1: a GGUF file .* safetensors checkpoint"):
        loading.fill(lambda *_: None, layer, param, None, "w2_qweight", "w2", 0)


def test_a_layer_without_experts_of_its_own_number_has_no_evidence(monkeypatch):
    """Take evidence of one layer as none of another."""
    layer, other = Weights(), Weights()
    object.__setattr__(other, "layer_id", 7)
    whole(layer)
    with pytest.raises(PlacementError, match="did not come through"):
        evidence.check("mlp", other)


def test_slots_without_an_expert_need_none(monkeypatch):
    layer = Weights()
    table = np.array([[0, 1, 2, 1, 0, -1]] * 2)
    now = types.SimpleNamespace(
        physical_to_logical_map_cpu=torch.from_numpy(table), num_layers=2, num_logical_experts=3
    )
    monkeypatch.setattr(evidence, "in_force", lambda: now)
    whole(layer, experts=range(3))
    evidence.check("mlp", layer)
