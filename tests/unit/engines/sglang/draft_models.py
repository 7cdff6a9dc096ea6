"""Build drafts of one rank as the plugin's tests need them, without an engine.

Their layers load as SGLang's own do.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import drafts, evidence, loading
from moe_placement_plugin.engines.sglang.state import STATE
from tests.support.sglang_settings import make_settings

EXPERTS, RANKS, HIDDEN, WIDTH = 6, 2, 4, 3
ROW = [5, 0, 3, 2, 1, 4]
TARGET = Placement([[7, 6, 5, 4, 3, 2, 1, 0]] * 3, 8, (4, 4), (0, 1, 2), "zigzag")
"""A placement of the target's three layers.

As the loader of a draft's layer 0 it is wrong in every slot.
"""
ROWS = Placement([ROW], EXPERTS, (3, 3), (3,), "draft")
PARAMETERS = {"w13_weight": (2 * WIDTH, HIDDEN), "w2_weight": (HIDDEN, WIDTH)}
SHARDS = {"w1": "w13_weight", "w3": "w13_weight", "w2": "w2_weight"}


def with_rows(rows: Placement | None, strategy: str = "zigzag") -> Placement:
    return Placement(
        TARGET.physical_to_logical, 8, TARGET.slots_per_rank, TARGET.layer_ids, strategy, {}, rows
    )


@contextmanager
def asking() -> Iterator:
    """Put settings into force: a placement for the target, with or without rows for the draft."""

    def asked(rows: Placement | None = None, strategy: str = "zigzag", **more):
        STATE.settings = make_settings(strategy, with_rows(rows, strategy), **more)
        return STATE.settings

    evidence.forget()
    try:
        yield asked
    finally:
        STATE.settings = None
        evidence.forget()


def runner(part: int | None = None, experts: int = EXPERTS, model=None):
    """Return as much of a draft's ``ModelRunner`` of SGLang's as the plugin looks at.

    The draft is one of a model with three layers.
    """
    config = types.SimpleNamespace(num_experts=experts, num_hidden_layers=3)
    return types.SimpleNamespace(
        is_draft_worker=True,
        draft_model_idx=part,
        model_config=types.SimpleNamespace(hf_text_config=config),
        server_args=types.SimpleNamespace(
            speculative_draft_load_format=None, speculative_num_steps=2
        ),
        model=model,
    )


def make_experts(rank: int, slots: int, layer_id: int = 0, quant_method=None):
    """Make a draft's ``FusedMoE`` of one rank, which loads as SGLang's own does."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    class Experts(FusedMoE):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layer_id, self.moe_ep_rank, self.moe_ep_size = layer_id, rank, RANKS
            self._expert_storage_rank = rank
            self.moe_tp_rank, self.moe_tp_size = 0, 1
            self._num_global_routed, self._num_local_routed = slots, slots // RANKS
            self.num_local_experts, self._has_fused_shared = slots // RANKS, False
            self.num_fused_shared_experts = 0
            self.quant_config, self.quant_method = None, quant_method
            self.use_presharded_weights = False
            for name, shape in PARAMETERS.items():
                memory = torch.full((slots // RANKS, *shape), torch.nan)
                self.register_parameter(name, torch.nn.Parameter(memory, requires_grad=False))
            evidence.note_built(self)

        def _weight_loader_impl(self, param, loaded_weight, weight_name, shard_id, expert_id):
            loading.fill(_write, self, param, loaded_weight, weight_name, shard_id, expert_id)

    return Experts()


def _write(self, param, loaded_weight, weight_name, shard_id, expert_id):
    half = {"w1": slice(0, WIDTH), "w3": slice(WIDTH, None)}.get(shard_id, slice(None))
    param.data[expert_id][half] = loaded_weight


def make_model(experts, name: str = "decoder"):
    """Make a draft whose MoE block is at ``model.NAME.mlp``."""
    model = block = torch.nn.Module()
    for part in ("model", *name.split("."), "mlp"):
        child = torch.nn.Module()
        block.add_module(part, child)
        block = child
    block.add_module("experts", experts)
    return model


def tensor(shard: str, expert: int) -> torch.Tensor:
    """Make an expert's part, every expert another."""
    shape = (HIDDEN, WIDTH) if shard == "w2" else (WIDTH, HIDDEN)
    return torch.full(shape, 10.0 * expert + len(shard) + ord(shard[1]) / 100)


def bring(layer, experts=range(EXPERTS), without=()):
    """Load as the model's loader, with our hook round `FusedMoE.weight_loader`."""
    own = type(layer).weight_loader
    own = getattr(own, "__wrapped__", own)
    for expert in experts:
        for shard, name in SHARDS.items():
            if (shard, expert) not in without:
                loading.load(
                    own, layer, getattr(layer, name), tensor(shard, expert), name, shard, expert
                )


def loaded(rank: int, part: int | None = None, slots: int = EXPERTS, name="decoder", **how):
    """Make a draft of one rank that was numbered, and whose checkpoint came in."""
    layer = make_experts(rank, slots)
    model = make_model(layer, name)
    one = runner(part, model=model)
    with drafts.loading(one):
        drafts.initialize(lambda: model)
        bring(layer, **how)
    return one, layer


def held(layer) -> list[int]:
    """Return the expert that each slot holds, all of it."""
    experts = []
    for slot in range(layer._num_local_routed):
        w1, w2 = layer.w13_weight[slot][:WIDTH], layer.w2_weight[slot]
        found = [e for e in range(EXPERTS) if torch.equal(w1, tensor("w1", e))]
        assert torch.equal(layer.w13_weight[slot][WIDTH:], tensor("w3", found[0]))
        assert torch.equal(w2, tensor("w2", found[0]))
        experts += found
    return experts
