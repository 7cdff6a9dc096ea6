"""Load tensors of all experts, slot by slot on every rank.

The loaders are those of SGLang's `FusedMoE` and gpt-oss.
"""

from __future__ import annotations

import types

import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import evidence, loading, positional
from moe_placement_plugin.engines.sglang.state import STATE
from tests.support.sglang_settings import make_settings

EXPERTS, HIDDEN, WIDTH = 8, 64, 32
PLANS = {
    "zigzag": ([0, 2, 4, 6, 1, 3, 5, 7], (4, 4)),
    "shuffled, with redundant experts": ([5, 0, 7, 2, 1, 3, 6, 4, 0, 5], (5, 5)),
    "four ranks": ([5, 0, 7, 2, 1, 3, 6, 4], (2, 2, 2, 2)),
}


@pytest.fixture(params=PLANS)
def placed(request):
    row, slots = PLANS[request.param]
    placement = Placement([row, row[::-1]], EXPERTS, slots, (0, 1))
    STATE.settings = make_settings("custom", placement)
    evidence.forget()
    yield placement
    STATE.settings = None
    evidence.forget()


def stacked(*shape: int, seed: int) -> torch.Tensor:
    """Make a tensor of all experts, every element another, of bytes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (EXPERTS, *shape), generator=generator).to(torch.uint8)


def tensors() -> dict[str, torch.Tensor]:
    """Make a checkpoint of two MXFP4 layers, as gpt-oss names them."""
    found = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        found |= {
            f"{prefix}.gate_up_proj_blocks": stacked(2 * WIDTH, HIDDEN // 32, 16, seed=layer),
            f"{prefix}.gate_up_proj_scales": stacked(2 * WIDTH, HIDDEN // 32, seed=layer + 10),
            f"{prefix}.gate_up_proj_bias": stacked(2 * WIDTH, seed=layer + 20),
            f"{prefix}.down_proj_blocks": stacked(HIDDEN, WIDTH // 32, 16, seed=layer + 30),
            f"{prefix}.down_proj_scales": stacked(HIDDEN, WIDTH // 32, seed=layer + 40),
            f"{prefix}.down_proj_bias": stacked(HIDDEN, seed=layer + 50),
        }
    return found


PARAMETERS = {
    "w13_weight": ("gate_up_proj_blocks", (2 * WIDTH, HIDDEN // 2)),
    "w13_weight_scale": ("gate_up_proj_scales", (2 * WIDTH, HIDDEN // 32)),
    "w13_weight_bias": ("gate_up_proj_bias", (2 * WIDTH,)),
    "w2_weight": ("down_proj_blocks", (HIDDEN, WIDTH // 2)),
    "w2_weight_scale": ("down_proj_scales", (HIDDEN, WIDTH // 32)),
    "w2_weight_bias": ("down_proj_bias", (HIDDEN,)),
}


def gpt_oss(placement: Placement, rank: int):
    """Make two layers of one rank, which load as `FusedMoE` and `GptOssForCausalLM` do."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    class Experts(FusedMoE):
        def __init__(self, number: int):
            torch.nn.Module.__init__(self)
            self.layer_id, self.moe_ep_rank, self.moe_ep_size = number, rank, placement.num_ranks
            self.with_bias = True
            self.moe_tp_rank, self.moe_tp_size = 0, 1
            self._num_global_routed = placement.num_slots
            self._num_local_routed = placement.num_slots // placement.num_ranks
            self.quant_config = types.SimpleNamespace(
                get_name=lambda: "mxfp4", is_static_cfg=lambda: True
            )
            for name, (_, shape) in PARAMETERS.items():
                memory = torch.zeros(self._num_local_routed, *shape, dtype=torch.uint8)
                param = torch.nn.Parameter(memory, requires_grad=False)
                param.weight_loader = self.load_hooked
                self.register_parameter(name, param)
            evidence.note_built(self)

        def load_hooked(self, param, loaded_weight, weight_name, shard_id, expert_id):
            original = getattr(FusedMoE.weight_loader, "__wrapped__", FusedMoE.weight_loader)
            loading.load(original, self, param, loaded_weight, weight_name, shard_id, expert_id)

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList()
    for number in range(2):
        block = torch.nn.Module()
        block.mlp = torch.nn.Module()
        block.mlp.experts = Experts(number)
        model.model.layers.append(block)
    model.config = types.SimpleNamespace(num_local_experts=EXPERTS, intermediate_size=WIDTH)
    return model


@pytest.fixture
def load_mxfp4(monkeypatch):
    """Return gpt-oss's own loader of MXFP4 experts, with our hook round it, for one rank."""
    from sglang.srt.models import gpt_oss as engine

    own = engine.GptOssForCausalLM._load_mxfp4_experts_weights
    own = getattr(own, "__wrapped__", own)

    def load(model, placement, rank, hook=positional.load_gpt_oss_mxfp4, without=()):
        parallel = types.SimpleNamespace(
            moe_tp_rank=0, moe_tp_size=1, moe_ep_rank=rank, moe_ep_size=placement.num_ranks
        )
        monkeypatch.setattr(engine, "get_parallel", lambda: parallel)
        kept = [(n, t) for n, t in tensors().items() if not n.endswith(tuple(without))]
        return hook(own, model, kept)

    return load


def test_gpt_oss_in_mxfp4_fills_every_slot_with_its_expert(placed, load_mxfp4):
    checkpoint = tensors()
    for rank in range(placed.num_ranks):
        evidence.forget()
        model = gpt_oss(placed, rank)
        load_mxfp4(model, placed, rank)
        assert model.config.num_local_experts == EXPERTS
        for number, block in enumerate(model.model.layers):
            held = placed.local_experts(number, rank).tolist()
            for name, (source, shape) in PARAMETERS.items():
                rows = checkpoint[f"model.layers.{number}.mlp.experts.{source}"][held]
                assert torch.equal(
                    getattr(block.mlp.experts, name), rows.reshape(len(held), *shape)
                ), (rank, number, name)
            evidence.check(f"layers.{number}.mlp", block.mlp.experts)


@pytest.mark.parametrize(
    ("lacking", "parameter"),
    [("gate_up_proj_bias", "w13_weight_bias"), ("down_proj_bias", "w2_weight_bias")],
)
def test_gpt_oss_without_its_biases_is_refused(placed, load_mxfp4, lacking, parameter):
    model = gpt_oss(placed, 0)
    load_mxfp4(model, placed, 0, without=(lacking,))
    with pytest.raises(PlacementError, match=f"the checkpoint brought no {parameter}"):
        evidence.check("layers.0.mlp", model.model.layers[0].mlp.experts)


def test_without_the_order_of_the_slots_gpt_oss_in_mxfp4_is_refused(placed, load_mxfp4):
    """Notice the fault: stock's loader copies by position."""
    model = gpt_oss(placed, 0)
    with pytest.raises(PlacementError, match="layer 0: .*w13_weight of all experts at once"):
        load_mxfp4(model, placed, 0, hook=lambda own, model, weights: own(model, weights))


def test_a_loader_that_takes_other_rows_is_refused(placed, load_mxfp4):
    """Notice the fault: the model cuts more rows for a rank than the rank has slots."""

    def other(own, model, weights):
        def wrong(model, weights):
            model.config.num_local_experts *= 2  # as if it read another number
            return own(model, ((n, torch.cat([t, t])) for n, t in weights))

        return positional.load_gpt_oss_mxfp4(wrong, model, weights)

    with pytest.raises(PlacementError, match="rows of .*w13_weight for the"):
        load_mxfp4(gpt_oss(placed, 0), placed, 0, hook=other)


def fused(placement, rank, experts=EXPERTS, name="mlp.experts.w13_weight"):
    """Return what `FusedMoE.weight_loader_fused` is given for layer 1 of a rank.

    Rows name their expert.
    """
    taken = []
    slots = placement.num_slots // placement.num_ranks
    layer = types.SimpleNamespace(layer_id=1, moe_ep_rank=rank, _num_local_routed=slots)
    checkpoint = torch.arange(float(experts))[:, None, None].expand(experts, 2, 3)
    positional.load_fused(
        lambda self, param, loaded, *_: taken.append(loaded), layer, None, checkpoint, name, "w13"
    )
    return layer, taken[0][:, 0, 0].tolist()


def test_a_fused_checkpoint_gives_each_rank_the_rows_of_its_slots(placed):
    for rank in range(placed.num_ranks):
        layer, rows = fused(placed, rank)
        assert rows == placed.local_experts(1, rank).tolist()
        evidence.check("mlp", layer)


def test_after_a_rebalance_a_fused_checkpoint_follows_the_map_in_force(placed, monkeypatch):
    """Notice the fault: the placement of the start is used.

    Routing does not go by it any more.
    """
    now = torch.from_numpy(placed.physical_to_logical.copy())[:, torch.randperm(placed.num_slots)]
    metadata = types.SimpleNamespace(
        physical_to_logical_map_cpu=now, num_layers=2, num_logical_experts=EXPERTS
    )
    monkeypatch.setattr(evidence, "in_force", lambda: metadata)
    slots = placed.num_slots // placed.num_ranks
    for rank in range(placed.num_ranks):
        assert fused(placed, rank)[1] == now[1, rank * slots : (rank + 1) * slots].tolist()
    assert fused(placed, 0)[1] != placed.local_experts(1, 0).tolist()


def test_what_sglang_only_warns_about_is_no_evidence(placed):
    layer, _ = fused(placed, 0, name="mlp.experts.w13_blocks")
    with pytest.raises(PlacementError, match="did not come through FusedMoE's loader"):
        evidence.check("mlp", layer)


def test_fused_weights_of_unknown_experts_are_refused(placed):
    with pytest.raises(PlacementError, match="layer 1: the checkpoint brings 2 of 8 experts"):
        fused(placed, 0, experts=2)


def test_a_drafts_fused_checkpoint_keeps_its_own_order(placed):
    """Keep rows in the draft's own order, for from 0.5.23 on a draft routes by logical ids.

    Rows in the target's order would be other experts.
    """
    slots = placed.num_slots // placed.num_ranks
    for rank in range(placed.num_ranks):
        taken = []
        layer = types.SimpleNamespace(
            layer_id=1, moe_ep_rank=rank, _num_local_routed=slots, uses_expert_location=False
        )
        checkpoint = torch.arange(float(EXPERTS))[:, None, None].expand(-1, 2, 3)
        positional.load_fused(
            lambda self, param, loaded, *_, into=taken: into.append(loaded),
            layer, None, checkpoint, "mlp.experts.w13_weight", "w13",
        )  # fmt: skip
        own = range(rank * slots, (rank + 1) * slots)  # spare slots get a row that is never used
        assert taken[0][:, 0, 0].tolist() == [slot if slot < EXPERTS else 0 for slot in own]
