"""Drafts of speculative decoding: rows of their own, by which weights come in and tokens go out. Without an engine."""

from __future__ import annotations

import logging
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.engines.sglang import (
    direct,
    draft_layers,
    draft_recording,
    drafts,
    evidence,
    layers,
    recording,
    reload,
    routing,
    settings,
    versions,
)
from moe_placement_plugin.errors import PlacementError
from moe_placement_plugin.placement import Placement

EXPERTS, RANKS, HIDDEN, WIDTH = 6, 2, 4, 3
ROW = [5, 0, 3, 2, 1, 4]
TARGET = Placement([[7, 6, 5, 4, 3, 2, 1, 0]] * 3, 8, (4, 4), (0, 1, 2), "zigzag")
"""A placement of the target's three layers; as the loader of a draft's layer 0 it is wrong in every slot."""
ROWS = Placement([ROW], EXPERTS, (3, 3), (3,), "draft")
PARAMETERS = {"w13_weight": (2 * WIDTH, HIDDEN), "w2_weight": (HIDDEN, WIDTH)}
SHARDS = {"w1": "w13_weight", "w3": "w13_weight", "w2": "w2_weight"}


def with_rows(rows: Placement | None, strategy: str = "zigzag") -> Placement:
    return Placement(
        TARGET.physical_to_logical, 8, TARGET.slots_per_rank, TARGET.layer_ids, strategy, {}, rows
    )


@pytest.fixture
def ask():
    """Puts settings into force; a placement for the target, with or without rows for the draft."""

    def asked(rows: Placement | None = None, strategy: str = "zigzag", **more):
        found = settings.Settings(strategy, placement=with_rows(rows, strategy), **more)
        settings.set_current(found)
        return found

    evidence.forget()
    yield asked
    settings.set_current(None)
    evidence.forget()


def runner(part: int | None = None, experts: int = EXPERTS, model=None):
    """SGLang's ``ModelRunner`` of a draft of a model with three layers, as far as the plugin looks at it."""
    config = types.SimpleNamespace(num_experts=experts, num_hidden_layers=3)
    return types.SimpleNamespace(
        is_draft_worker=True,
        draft_model_idx=part,
        model_config=types.SimpleNamespace(hf_text_config=config),
        server_args=types.SimpleNamespace(speculative_draft_load_format=None),
        model=model,
    )


def make_experts(rank: int, slots: int, layer_id: int = 0, quant_method=None):
    """A draft's ``FusedMoE`` of one rank, which loads as SGLang's own does."""
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
            layers.fill(_write, self, param, loaded_weight, weight_name, shard_id, expert_id)

    return Experts()


def _write(self, param, loaded_weight, weight_name, shard_id, expert_id):
    half = {"w1": slice(0, WIDTH), "w3": slice(WIDTH, None)}.get(shard_id, slice(None))
    param.data[expert_id][half] = loaded_weight


def make_model(experts, name: str = "decoder"):
    """A draft whose MoE block is at ``model.NAME.mlp``."""
    model = block = torch.nn.Module()
    for part in ("model", *name.split("."), "mlp"):
        child = torch.nn.Module()
        block.add_module(part, child)
        block = child
    block.add_module("experts", experts)
    return model


def tensor(shard: str, expert: int) -> torch.Tensor:
    """An expert's part, every expert another."""
    shape = (HIDDEN, WIDTH) if shard == "w2" else (WIDTH, HIDDEN)
    return torch.full(shape, 10.0 * expert + len(shard) + ord(shard[1]) / 100)


def bring(layer, experts=range(EXPERTS), without=()):
    """The model's loader, with our hook round `FusedMoE.weight_loader`."""
    own = type(layer).weight_loader
    own = getattr(own, "__wrapped__", own)
    for expert in experts:
        for shard, name in SHARDS.items():
            if (shard, expert) not in without:
                layers.load(
                    own, layer, getattr(layer, name), tensor(shard, expert), name, shard, expert
                )


def loaded(rank: int, part: int | None = None, slots: int = EXPERTS, name="decoder", **how):
    """A draft of one rank that was numbered, and whose checkpoint came in."""
    layer = make_experts(rank, slots)
    model = make_model(layer, name)
    one = runner(part, model=model)
    with drafts.loading(one):
        drafts.initialize(lambda: model)
        bring(layer, **how)
    return one, layer


def held(layer) -> list[int]:
    """The expert that each slot holds, all of it."""
    experts = []
    for slot in range(layer._num_local_routed):
        w1, w2 = layer.w13_weight[slot][:WIDTH], layer.w2_weight[slot]
        found = [e for e in range(EXPERTS) if torch.equal(w1, tensor("w1", e))]
        assert torch.equal(layer.w13_weight[slot][WIDTH:], tensor("w3", found[0]))
        assert torch.equal(w2, tensor("w2", found[0]))
        experts += found
    return experts


def test_equal_ranks_hold_just_their_experts():
    own = draft_layers.lay_out(ROWS, 0, 3, EXPERTS)
    assert own.experts.tolist() == ROW and not own.in_order
    assert own.first_slot.tolist() == [1, 4, 3, 2, 5, 0, -1]
    assert own.local_slots(0).tolist() == [1, -1, -1, 2, -1, 0, -1]
    assert own.local_slots(1).tolist() == [-1, 1, 0, -1, 2, -1, -1]
    assert own.slots_of(4) == [5] and own.of_rank(1).tolist() == ROW[3:]


def test_unequal_ranks_are_filled_up_and_no_token_goes_there():
    """As vLLM places 5 experts on 2 ranks: 3 and 2. SGLang needs 3 and 3, and the spare slot a weight that is a number."""
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
        drafts.current().redundant = redundant
        layers.build(original, torch.nn.Module(), num_experts=routed)
    assert built == [slots]


def test_experts_that_do_not_divide_over_the_ranks_get_spare_slots(ask):
    built = []
    ask()
    with drafts.loading(runner(experts=5)):
        layers.build(lambda self, num_experts: built.append(num_experts), torch.nn.Module(), 5)
    assert built == [6]


def test_a_draft_that_counts_its_experts_otherwise_is_refused(ask):
    ask()
    with drafts.loading(runner()), pytest.raises(PlacementError, match="with 7 experts, its .* 6"):
        layers.build(lambda self, num_experts: None, torch.nn.Module(), num_experts=7)


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
    assert drafts._reads(one, types.SimpleNamespace(reads=True)) and asked.placement.draft is rows


@pytest.mark.parametrize("rank", range(RANKS))
def test_slots_that_only_fill_a_rank_up_are_filled_too(ask, rank):
    ask(Placement([ROW], EXPERTS, (4, 2), (3,)))
    _, layer = loaded(rank, slots=8)
    assert held(layer) == [ROW[:4], [1, 4, 1, 1]][rank]
    evidence.check("mlp", layer)


def test_the_targets_map_is_not_the_drafts(ask, monkeypatch):
    """The fault, SGLang's own way up to 0.5.22: the draft's layer 0 is loaded by the target's layer 0."""
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
    """Its load format may be another than the target's."""
    asked = ask(strategy="linear")
    one, _ = loaded(0, experts=())
    one.server_args.speculative_draft_load_format = own
    assert drafts._reads(one, asked) is (own != "dummy")


def test_a_slot_of_a_draft_that_nothing_filled_is_noticed(ask, monkeypatch):
    """The fault: a loader that fills the first of two slots that hold an expert."""
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


def test_rows_for_a_draft_in_parts_are_looked_for_in_all_of_them(ask, monkeypatch):
    """SGLang loads each MTP layer as a model of its own when they are chained."""
    from sglang.srt import runtime_context

    steps = types.SimpleNamespace(speculative_num_steps=2)
    monkeypatch.setattr(runtime_context, "get_spec", lambda: steps)
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
        monkeypatch.setattr(versions, "topk_finds_the_placement", lambda own=own: own)
        with drafts.loading(runner()):
            if not refused:
                drafts.initialize(lambda: make_model(layer))
                continue
            with pytest.raises(PlacementError, match="is layer 45 of the draft, the target has 3"):
                drafts.initialize(lambda: make_model(layer))


def test_the_target_is_no_draft(ask):
    """Nothing of it is numbered, whatever was loaded before."""
    ask(ROWS)
    loaded(0)
    assert drafts.current() is None
    layer = make_experts(0, 8)
    with drafts.loading(None):
        drafts.initialize(lambda: make_model(layer))
    assert draft_layers.of_layer(layer) is None
    assert evidence.experts_of_slots(layer).tolist() == [7, 6, 5, 4]


def test_without_a_placement_a_draft_is_sglangs_own():
    settings.set_current(None)
    layer = make_experts(0, EXPERTS)
    with drafts.loading(runner()):
        assert drafts.current() is None
        drafts.initialize(lambda: make_model(layer))
    assert draft_layers.of_layer(layer) is None


class Router:
    """A TopK layer, as far as routing goes."""

    def __init__(self, native=False):
        self.topk_config = types.SimpleNamespace(
            torch_native=native, num_fused_shared_experts=0, output_format=None
        )


def route(ids, own: draft_layers.DraftLayer | None, given="the target's row", native=False):
    """Ids that leave the TopK layer of a draft, which a model may have given the target's dispatch information."""
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
    """The fault: up to 0.5.22 models give their TopK layer the row of the target's layer with the same number."""
    ids, info = route([[0, 5], [4, -1]], draft_layers.in_order(EXPERTS, RANKS, 3, EXPERTS))
    assert ids == [[0, 5], [4, -1]] and info is None
    with pytest.raises(AssertionError, match="the target's"):
        route([[0, 5]], None)


@pytest.mark.parametrize("finds", [True, False])
def test_the_torch_native_router_remaps_where_sglang_lets_it(monkeypatch, finds):
    """Up to 0.5.22 it asserts that there is no dispatch information; later versions remap by it."""
    monkeypatch.setattr(versions, "topk_finds_the_placement", lambda: finds)
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
    assert not evidence._brought and not evidence._filled


class Graph:
    """What replays a draft's steps, as far as the recording looks at it."""

    def __init__(self, one):
        self.model_runner = one


def recorded(monkeypatch, tmp_path, algorithm="EAGLE", part=None):
    """A draft with a block at ``model.decoder.mlp`` under a recording; its runner."""
    from sglang.srt import runtime_context
    from sglang.srt.layers.moe.topk import TopK

    wanted = recording.RecordSettings(str(tmp_path / "load.safetensors"), 60.0, True)
    monkeypatch.setattr(recording, "_current", wanted)
    parallel = types.SimpleNamespace(tp_rank=0, pp_rank=0)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(draft_recording, "hooks", lambda: types.SimpleNamespace(apply_now=int))
    model = make_model(make_experts(0, EXPERTS))
    router = TopK.__new__(TopK)
    torch.nn.Module.__init__(router)
    router.topk_config = types.SimpleNamespace(output_format=None)
    model.model.decoder.mlp.topk = router
    one = runner(part, model=model)
    one.device, one.model_config.context_len = "cpu", 64
    one.server_args = types.SimpleNamespace(
        speculative_algorithm=algorithm, speculative_draft_model_path="a/draft", pp_size=1, tp_size=2,
        ep_size=2, dp_size=1, chunked_prefill_size=-1, max_prefill_tokens=64,
    )  # fmt: skip
    recording._load_model(lambda self: None, one)
    return one, router


def a_batch(mode: str, size: int, tokens: int, lengths=None):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return types.SimpleNamespace(
        forward_mode=ForwardMode[mode], batch_size=size, positions=torch.zeros(tokens),
        extend_seq_lens_cpu=lengths, extend_prefix_lens_cpu=lengths and [0] * size, input_ids=torch.zeros(0),
    )  # fmt: skip


def test_a_drafts_load_is_recorded_apart(monkeypatch, tmp_path):
    """A prompt's tokens, those that were verified, and a token of each branch; in graphs too."""
    one, router = recorded(monkeypatch, tmp_path)
    found = getattr(one, recording.RECORDING)
    monkeypatch.setattr(found.recorder, "served", lambda: None)
    ids = torch.tensor([[0, 5]] * 8, dtype=torch.int32)

    def passes(count=1):
        for _ in range(count):
            recording._post_process(lambda *args: None, ids, None, router.topk_config)

    recording._forward(lambda *args: passes(), one, a_batch("EXTEND", 2, 5, [2, 3]))
    draft_recording._replay(lambda *args: passes(2), Graph(one), a_batch("DECODE", 3, 6))
    draft_recording._replay(lambda *args: passes(), Graph(one), a_batch("DRAFT_EXTEND_V2", 2, 8))
    recording._forward(lambda *args: passes(), one, a_batch("IDLE", 0, 0))
    counts, pairs = found.counters.snapshot()
    assert counts[:, 0].tolist() == [[5, 0, 0, 0, 0, 5], [20, 0, 0, 0, 0, 20]] and pairs is None
    assert found.recorder.path == tmp_path / "load.draft.safetensors"
    assert found.recorder.windows.layer_ids == (3,)
    assert found.recorder.windows.metadata["model"] == "a/draft"


@pytest.mark.parametrize(
    ("algorithm", "part", "why"),
    [("FROZEN_KV_MTP", None, "FROZEN_KV_MTP in graphs of their own"), ("EAGLE", 0, "in graphs of")],
)
def test_a_recording_says_that_it_leaves_a_draft_out(
    monkeypatch, tmp_path, caplog, algorithm, part, why
):
    with caplog.at_level(logging.WARNING):
        one, _ = recorded(monkeypatch, tmp_path, algorithm, part)
    assert "the load of the draft's 1 MoE layers is not recorded" in caplog.text
    assert why in caplog.text and not hasattr(one, recording.RECORDING)


def test_a_dense_draft_is_not_spoken_of(monkeypatch, caplog):
    wanted = recording.RecordSettings("load.safetensors", 60.0, False)
    monkeypatch.setattr(recording, "_current", wanted)
    dense = runner(model=torch.nn.Linear(1, 1))
    with caplog.at_level(logging.INFO):
        recording._load_model(lambda self: None, dense)
    assert not caplog.text and not hasattr(dense, recording.RECORDING)


def test_a_recording_of_another_draft_is_not_continued(monkeypatch, tmp_path):
    from moe_placement_plugin.load import ExpertLoad

    other = ExpertLoad(np.ones((1, 2, EXPERTS)), metadata={"window_start": [0.0]})
    other.write(tmp_path / "load.draft.safetensors")
    with pytest.raises(PlacementError, match="load.draft.safetensors exists and is the recording"):
        recorded(monkeypatch, tmp_path)
