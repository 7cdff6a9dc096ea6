"""Test where a draft's tokens go, and new weights of a draft that serves, without an engine."""

from __future__ import annotations

import types

import pytest
import torch

from moe_placement_plugin.engines.sglang import (
    compat,
    direct,
    draft_layers,
    drafts,
    reload,
    routing,
)
from moe_placement_plugin.engines.sglang.state import STATE

from .draft_models import EXPERTS, RANKS, ROW, ROWS, asking, bring, held, loaded


@pytest.fixture
def ask():
    """See `draft_models.asking`."""
    with asking() as asked:
        yield asked


class Router:
    """Stand in for a TopK layer, as far as routing goes."""

    def __init__(self, native=False):
        self.topk_config = types.SimpleNamespace(
            torch_native=native, num_fused_shared_experts=0, output_format=None
        )


def route(ids, own: draft_layers.DraftLayer | None, given="the target's row", native=False):
    """Return the ids that leave the TopK layer of a draft.

    A model may have given it the target's dispatch information.
    """
    router = Router(native)
    if own is not None:
        info = None if own.in_order else draft_layers.dispatch_info(own, torch.device("cpu"))
        draft_layers.routes(router.topk_config, draft_layers.DraftRouting(info))
    seen = []

    def select(hidden_states, router_logits, topk_config, expert_location_dispatch_info=None):
        seen.append(expert_location_dispatch_info)

    def after(ids, weights, config, logits, layer, padded, info, **rest):
        assert info is None or not isinstance(info, str), "the target's"
        return ids, weights, ids

    routing.select(select, None, None, router.topk_config, expert_location_dispatch_info=given)
    result = routing.post_process(
        after,
        torch.tensor(ids, dtype=torch.int32),
        None,
        router.topk_config,
        None,
        0,
        expert_location_dispatch_info=given,
    )
    return result[0].tolist(), seen[0]


def test_tokens_go_to_the_drafts_own_slots():
    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    ids, info = route([[0, 5], [4, -1]], own)
    assert ids == [[1, 0], [5, -1]], "each to the slot of its expert; padding nowhere"
    assert info.num_physical_experts == EXPERTS


def test_in_sglangs_own_order_the_targets_row_is_kept_away():
    """Notice the fault: models give their TopK layer the target's row, up to 0.5.22.

    It is the row of the target's layer with the same number.
    """
    ids, info = route([[0, 5], [4, -1]], draft_layers.in_order(EXPERTS, RANKS, 3, EXPERTS))
    assert ids == [[0, 5], [4, -1]] and info is None
    with pytest.raises(AssertionError, match="the target's"):
        route([[0, 5]], None)


@pytest.mark.parametrize("finds", [True, False])
def test_the_torch_native_router_remaps_where_sglang_lets_it(monkeypatch, finds):
    """Pass dispatch information only where the router takes it.

    Up to 0.5.22 it asserts that there is none; later versions remap by it.
    """
    monkeypatch.setattr(compat, "topk_finds_the_placement", lambda: finds)
    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    _, info = route([[0, 5]], own, given=None, native=True)
    assert (info is not None) is finds


def test_sglangs_own_remapping_takes_the_drafts_row():
    from sglang.srt.eplb.expert_location_dispatch import topk_ids_logical_to_physical

    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    info = draft_layers.dispatch_info(own, torch.device("cpu"))
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [-1, -1, 2]], dtype=torch.int32)
    found = topk_ids_logical_to_physical(ids, info)
    assert found.tolist() == [[1, 4, 3], [2, 5, 0], [-1, -1, 3]] and found.dtype == ids.dtype


def test_one_look_up_does_for_a_draft_too(ask, monkeypatch):
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "get_device", lambda: "cpu")
    ask(ROWS, direct=True)
    _, layer = loaded(1)
    layer.quant_method = type("UnquantizedFusedMoEMethod", (), {"runner": None})()
    dispatcher = layer.dispatcher = object.__new__(StandardDispatcher)
    dispatcher.__dict__.update(
        skip_local_expert_mapping=False, use_aiter_moe_runner=False, num_local_shared_experts=0,
        num_experts=EXPERTS, moe_ep_size=RANKS, local_expert_mapping=None,
    )  # fmt: skip
    router = TopK.__new__(TopK)
    torch.nn.Module.__init__(router)
    router.topk_config = types.SimpleNamespace()
    own = draft_layers.of_layer(layer)
    drafts._route(layer, router, own)
    assert dispatcher.local_expert_mapping.tolist() == [-1, 1, 0, -1, 2, -1, -1]
    assert direct.in_force(router.topk_config)
    assert routing._resolve(router.topk_config, "the target's") is None


@pytest.mark.parametrize("strategy", ["zigzag", "linear"])
def test_a_drafts_update_by_position_is_refused_where_experts_lie_elsewhere(ask, strategy):
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    ask(strategy=strategy)
    one, _ = loaded(0)
    seen = []

    def original(self, named_tensors, load_format=None):
        seen.append(named_tensors)
        return True, "Success"

    original.__wrapped__ = WeightUpdater.update_weights_from_tensor
    updater = types.SimpleNamespace(get_model_runner=lambda: one)
    named = [("model.decoder.mlp.experts.w2_weight", None)]
    succeeded, message = reload.update(
        "update_weights_from_tensor", original, updater, named, load_format="direct"
    )
    assert succeeded is (strategy == "linear") and bool(seen) is succeeded
    assert succeeded or "copies experts into slots by position" in message


def test_new_weights_of_a_draft_go_by_its_own_rows(ask):
    ask(ROWS)
    one, layer = loaded(1)
    layer.w13_weight.data.fill_(torch.nan)
    layer.w2_weight.data.fill_(torch.nan)
    updater = types.SimpleNamespace(get_model_runner=lambda: one)

    def original(self, path=""):
        bring(layer)
        return True, "Success"

    assert reload.update("update_weights_from_disk", original, updater)[0]
    assert held(layer) == ROW[3:]
    assert not STATE.brought and not STATE.filled
