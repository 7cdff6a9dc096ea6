"""Test a draft's MoE layers, without an engine.

These are their slots, numbers and rows, the weights that come in, and what is refused.
"""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import (
    compat,
    draft_layers,
    drafts,
    evidence,
    loading,
)
from moe_placement_plugin.engines.sglang.state import STATE
from tests.support.sglang_settings import make_settings

from .draft_models import (
    EXPERTS,
    RANKS,
    ROW,
    ROWS,
    TARGET,
    asking,
    bring,
    held,
    loaded,
    make_experts,
    make_model,
    runner,
)


@pytest.fixture
def ask():
    """See `draft_models.asking`."""
    with asking() as asked:
        yield asked


def test_equal_ranks_hold_just_their_experts():
    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    assert own.experts.tolist() == ROW and not own.in_order
    assert own.first_slot.tolist() == [1, 4, 3, 2, 5, 0, -1]
    assert own.local_slots(0).tolist() == [1, -1, -1, 2, -1, 0, -1]
    assert own.local_slots(1).tolist() == [-1, 1, 0, -1, 2, -1, -1]
    assert own.slots_of(4) == [5] and own.of_rank(1).tolist() == ROW[3:]


def test_unequal_ranks_are_filled_up_and_no_token_goes_there():
    """Fill unequal ranks up as vLLM places 5 experts on 2 ranks: 3 and 2.

    SGLang needs 3 and 3, and the spare slot a weight that is a number.
    """
    rows = Placement([[4, 1, 0, 3, 2]], 5, (3, 2), (0,))
    own = draft_layers.lay_out(rows, 0, 0, 6)
    assert own.experts.tolist() == [4, 1, 0, 3, 2, 3]
    assert own.slots_of(3) == [3, 5] and own.first_slot[3] == 3
    nothing = draft_layers.lay_out(Placement([[1, 0]], 2, (2, 0), (0,)), 0, 0, 4)
    assert nothing.experts.tolist() == [1, 0, 0, 0]


def test_sglangs_own_order_has_its_spare_slots_at_the_end():
    own = draft_layers.in_order(5, 2, None, 6)
    assert own.in_order and own.experts.tolist() == [0, 1, 2, 3, 4, 3]
    assert draft_layers.in_order(2, 3, None, 6).experts.tolist() == [0, 1, 0, 0, 0, 0]
    same = draft_layers.lay_out(Placement([[0, 1, 2, 3]], 4, (2, 2), (0,)), 0, 0, 4)
    assert same.in_order


def test_an_expert_that_a_draft_has_not_is_refused():
    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    with pytest.raises(
        PlacementError, match="layer 3 of the draft: .* brings expert 6, .* names 6"
    ):
        own.slots_of(6)


@pytest.mark.parametrize(
    ("rows", "redundant", "routed", "slots"),
    [
        (None, 0, 6, 6),
        (None, 2, 8, 8),  # the model adds the target's redundant slots: they stay, filled up
        (None, 2, 6, 6),  # the model does not
        (Placement([ROW], EXPERTS, (4, 2), (3,)), 0, 6, 8),
    ],
)
def test_a_drafts_layers_have_the_slots_that_its_ranks_need(ask, rows, redundant, routed, slots):
    built = []

    def original(self, num_experts, num_fused_shared_experts=0):
        built.append(num_experts)

    ask(rows)
    with drafts.loading(runner()):
        STATE.draft.redundant = redundant
        loading.build(original, torch.nn.Module(), num_experts=routed)
    assert built == [slots]


def test_experts_that_do_not_divide_over_the_ranks_get_spare_slots(ask):
    built = []
    ask()
    with drafts.loading(runner(experts=5)):
        loading.build(lambda self, num_experts: built.append(num_experts), torch.nn.Module(), 5)
    assert built == [6]


def test_a_draft_that_counts_its_experts_otherwise_is_refused(ask):
    ask()
    with drafts.loading(runner()), pytest.raises(PlacementError, match="with 7 experts, its .* 6"):
        loading.build(lambda self, num_experts: None, torch.nn.Module(), num_experts=7)


@pytest.mark.parametrize(
    ("name", "part", "number"),
    [
        ("decoder", None, 3),  # DeepSeek's and GLM's MTP layer: behind the target's three
        ("mtp_block", 1, 4),  # Step 3.5's second one
        ("layers.0", None, 0),  # Qwen3-Next's; a model of its own
        ("layers.2", None, 2),
    ],
)
def test_layers_are_numbered_as_in_vllm(ask, monkeypatch, name, part, number):
    ask()
    _, layer = loaded(0, part, name=name)
    assert draft_layers.of_layer(layer).number == number


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(
    ("rows", "strategy", "more", "row"),
    [
        (ROWS, "eplb", {}, ROW),
        (None, "zigzag", {}, [0, 2, 4, 1, 3, 5]),
        (None, "balanced", {}, [0, 1, 2, 3, 4, 5]),
        (None, "linear", {}, [0, 1, 2, 3, 4, 5]),
        (
            None,
            "eplb",
            {},
            [0, 1, 2, 3, 4, 5],
        ),  # it plans from a load, and there is none of a draft
        (None, "zigzag", {"moves": True}, [0, 1, 2, 3, 4, 5]),  # EPLB moves the target's only
    ],
)
def test_sglangs_loader_fills_every_slot_with_its_expert(ask, rank, rows, strategy, more, row):
    asked = ask(rows, strategy, **more)
    one, layer = loaded(rank)
    assert held(layer) == row[rank * 3 : rank * 3 + 3]
    evidence.check("mlp", layer)
    assert drafts._reads(one, make_settings("zigzag")) and asked.plan.draft is rows


@pytest.mark.parametrize("rank", range(RANKS))
def test_slots_that_only_fill_a_rank_up_are_filled_too(ask, rank):
    ask(Placement([ROW], EXPERTS, (4, 2), (3,)))
    _, layer = loaded(rank, slots=8)
    assert held(layer) == [ROW[:4], [1, 4, 1, 1]][rank]
    evidence.check("mlp", layer)


def test_the_targets_map_is_not_the_drafts(ask, monkeypatch):
    """Notice the fault: the draft's layer 0 is loaded by the target's layer 0.

    It is SGLang's own way up to 0.5.22.
    """
    from sglang.srt.layers.moe.fused_moe_triton import layer as engine

    table = torch.from_numpy(TARGET.physical_to_logical.astype(np.int64))
    map_of_target = types.SimpleNamespace(
        physical_to_logical_map_cpu=table,
        num_layers=3,
        num_logical_experts=8,
        logical_to_all_physical=lambda layer, expert, everywhere=False: [7 - expert],
    )
    monkeypatch.setattr(engine, "get_global_expert_location_metadata", lambda: map_of_target)
    monkeypatch.setattr(evidence, "in_force", lambda: map_of_target)
    ask(ROWS)
    _, layer = loaded(0)
    assert held(layer) == ROW[:3]
    layer.uses_expert_location = True
    monkeypatch.setattr(
        draft_layers,
        "load",
        lambda original, *rest: original(*rest),
    )
    with pytest.raises(PlacementError, match="puts w1 of expert 5 into slot 2 of rank 0, which"):
        bring(layer)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"experts": ()}, "mlp.experts: its weights did not come through FusedMoE's loader"),
        ({"experts": range(5)}, "w1 of 5 of 6 experts, expert 5 is missing"),
        ({"without": [("w2", e) for e in range(6)]}, "nothing was seen to fill w2_weight"),
        ({"without": [("w2", 3)]}, "w2 of 5 of 6 experts, expert 3 is missing"),
    ],
)
def test_a_draft_that_was_not_filled_ends_the_worker(ask, how, message):
    asked = ask(ROWS)
    one, _ = loaded(0, **how)
    with pytest.raises(PlacementError, match=f"draft model: model.decoder.*{message}"):
        drafts.settle(one, asked)


@pytest.mark.parametrize("own", [None, "auto", "dummy"])
def test_a_dummy_draft_needs_no_evidence(ask, own):
    """Need no evidence, since a draft's load format may be another than the target's."""
    asked = ask(strategy="linear")
    one, _ = loaded(0, experts=())
    one.server_args.speculative_draft_load_format = own
    assert drafts._reads(one, asked) is (own != "dummy")


def test_a_slot_of_a_draft_that_nothing_filled_is_noticed(ask, monkeypatch):
    """Notice the fault: a loader fills only the first of two slots that hold an expert."""
    asked = ask(Placement([ROW], EXPERTS, (4, 2), (3,)))
    own = draft_layers.DraftLayer.slots_of
    monkeypatch.setattr(draft_layers.DraftLayer, "slots_of", lambda self, e: own(self, e)[:1])
    one, _ = loaded(1, slots=8)
    with pytest.raises(PlacementError, match="nothing filled slot 2 of rank 1 with w1 of expert 1"):
        drafts.settle(one, asked)


def test_a_draft_that_was_built_past_the_numbering_is_refused(ask):
    asked = ask()
    one = runner(model=make_model(make_experts(0, EXPERTS)))
    with pytest.raises(PlacementError, match="was built past SGLang's _initialize_model"):
        drafts.settle(one, asked)


@pytest.mark.parametrize(
    ("rows", "name", "experts", "message"),
    [
        (ROWS, "layers.0", EXPERTS, r"layer 0 of the draft, is not among .* \(layers \[3\]\)"),
        (Placement([ROW, ROW], EXPERTS, (3, 3), (3, 4)), "decoder", EXPERTS, r"layer 4 .* \[3\]"),
        (Placement([[0, 1, 2, 3]], 4, (2, 2), (3,)), "decoder", EXPERTS, "has 6 experts, .* for 4"),
        (Placement([ROW], EXPERTS, (3, 3), (0,)), "decoder", EXPERTS, "layer 3 of the draft, is"),
    ],
)
def test_rows_of_another_draft_are_refused_before_its_weights_come(
    ask, rows, name, experts, message
):
    ask(rows)
    with pytest.raises(PlacementError, match=message):
        loaded(0, name=name, experts=())


def test_rows_for_a_draft_in_parts_are_looked_for_in_all_of_them(ask):
    """Look in all parts, since SGLang loads chained MTP layers each as a model of its own."""
    rows = Placement([ROW, ROW[::-1]], EXPERTS, (3, 3), (3, 4))
    ask(rows)
    for part, row in enumerate((ROW, ROW[::-1])):
        _, layer = loaded(0, part)
        assert held(layer) == row[:3]
    ask(Placement([ROW, ROW, ROW], EXPERTS, (3, 3), (3, 4, 5)))
    loaded(0, 0)
    with pytest.raises(PlacementError, match="a row for layer 5 of the draft"):
        loaded(0, 1)


def test_other_ranks_are_refused(ask):
    ask()
    layer = make_experts(0, EXPERTS)
    layer.moe_ep_size = 1
    with drafts.loading(runner()), pytest.raises(PlacementError, match="on 1 EP ranks, .* for 2"):
        drafts.initialize(lambda: make_model(layer))


@pytest.mark.parametrize("strategy", ["zigzag", "linear"])
def test_what_is_kept_by_the_trivial_map_is_refused_where_experts_move(ask, strategy):
    method = type("QuarkInt4Fp8MoEMethod", (), {})()
    ask(strategy=strategy)
    layer, other = make_experts(0, EXPERTS, quant_method=method), make_experts(0, EXPERTS)
    other.w2_weight._sglang_require_global_experts = True
    for one, message in ((layer, "QuarkInt4Fp8MoEMethod"), (other, "keeps w2_weight for all")):
        with drafts.loading(runner()):
            if strategy == "linear":
                drafts.initialize(lambda one=one: make_model(one))
                continue
            with pytest.raises(PlacementError, match=f"{message}.*a plan without rows"):
                drafts.initialize(lambda one=one: make_model(one))


def test_a_layer_that_sglang_looks_up_among_the_targets_is_refused_where_there_is_none(
    ask, monkeypatch
):
    table = torch.from_numpy(TARGET.physical_to_logical.astype(np.int64))
    metadata = types.SimpleNamespace(num_layers=3, physical_to_logical_map_cpu=table)
    monkeypatch.setattr(evidence, "in_force", lambda: metadata)
    ask()
    layer = make_experts(0, EXPERTS, layer_id=45)  # as Step 3.5's
    for own, refused in ((True, False), (False, True)):
        monkeypatch.setattr(compat, "topk_finds_the_placement", lambda own=own: own)
        with drafts.loading(runner()):
            if not refused:
                drafts.initialize(lambda: make_model(layer))
                continue
            with pytest.raises(PlacementError, match="is layer 45 of the draft, the target has 3"):
                drafts.initialize(lambda: make_model(layer))


def test_the_target_is_no_draft(ask):
    """Number nothing of the target, whatever was loaded before."""
    ask(ROWS)
    loaded(0)
    assert STATE.draft is None
    layer = make_experts(0, 8)
    with drafts.loading(None):
        drafts.initialize(lambda: make_model(layer))
    assert draft_layers.of_layer(layer) is None
    assert evidence.experts_of_slots(layer).tolist() == [7, 6, 5, 4]


def test_without_a_placement_a_draft_is_sglangs_own():
    STATE.settings = None
    layer = make_experts(0, EXPERTS)
    with drafts.loading(runner()):
        assert STATE.draft is None
        drafts.initialize(lambda: make_model(layer))
    assert draft_layers.of_layer(layer) is None
