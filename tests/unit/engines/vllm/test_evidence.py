"""Test what counts as seen: every slot and weight, by the map; and what may be left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.vllm import (  # noqa: E402
    evidence,
    layers,
    loading,
    reload,
    stacked,
    support,
)
from moe_placement_plugin.engines.vllm.state import KEY, Carried  # noqa: E402
from tests.support.vllm_layers import (  # noqa: E402
    EXPERTS,
    WIDTH,
    Model,
    layer_of,
    load,
    weights,
)
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("loading_is_watched"),
]


def test_moved_slots_compares_the_first_expert_too():
    assert not layers.moved_slots(layer_of([0, 1, 2]))
    assert not layers.moved_slots(layer_of([3, 4, 5], rank=1))
    assert layers.moved_slots(layer_of([3, 4, 5])), "consecutive, but another rank's block"
    assert layers.moved_slots(layer_of([0, 2, 4])) and layers.moved_slots(layer_of([1, 0, 2]))
    assert layers.moved_slots(layer_of([0, 1])), "less than the engine would put here"


@pytest.mark.parametrize("moved", [True, False])
def test_all_experts_one_at_a_time_pass(moved):
    layer = layer_of([1, 3, 5])
    evidence.watch(layer, moved)
    load(layer, weights())
    evidence.check_evidence(layer)
    assert evidence.EVIDENCE not in vars(layer)


FAULTS = {
    "nothing": (lambda la, w: None, "nothing was seen to be put into w13_weight by the map"),
    "one expert missing": (
        lambda la, w: load(la, w, experts=[0, 1, 2, 4, 5]),
        r"brought w13_weight \(w1\) for 2 of 3 slots .* slot 1 \(expert 3\) was never filled",
    ),
    "w1 without w3": (
        lambda la, w: load(la, w, shards=("w1", "w2")),
        "only its part w1 was seen to be put into w13_weight",
    ),
    "w13 without w2": (
        lambda la, w: load(la, w, shards=("w1", "w3")),
        "nothing was seen to be put into w2_weight",
    ),
    "copied by position": (
        lambda la, w: [p.data.normal_() for p in la.parameters()],
        "nothing was seen to be put into w13_weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_less_than_all_is_refused(fault):
    layer = layer_of([1, 3, 5])
    evidence.watch(layer, True)
    put, message = FAULTS[fault]
    put(layer, weights())
    with pytest.raises(PlacementError, match=message):
        evidence.check_evidence(layer)


def test_the_engines_own_order_needs_no_evidence_of_what_it_copies_at_once():
    layer = layer_of([0, 1, 2])
    evidence.watch(layer, False)
    for parameter in layer.parameters():
        parameter.data.normal_()
    evidence.check_evidence(layer)


def test_a_bias_that_nothing_brings_may_stay_and_one_that_came_by_position_may_not():
    layer = layer_of([1, 3, 5], bias=True)
    evidence.watch(layer, True)
    load(layer, weights())
    getattr(layer, evidence.EVIDENCE).settle(layer)
    evidence.check_evidence(layer)
    for rows, refused in ((torch.ones(WIDTH).expand(3, -1), False), (torch.randn(3, WIDTH), True)):
        layer = layer_of([1, 3, 5], bias=True)
        evidence.watch(layer, True)
        load(layer, weights())
        layer.w2_bias.data.copy_(rows)
        if refused:
            with pytest.raises(PlacementError, match="w2_bias of many experts was copied at once"):
                getattr(layer, evidence.EVIDENCE).settle(layer)
        else:  # the same for all experts: it does not matter where they lie
            getattr(layer, evidence.EVIDENCE).settle(layer)


def test_a_parameter_that_is_made_when_its_weight_comes_needs_evidence_too():
    from torch.nn.parameter import UninitializedParameter

    for filled in (True, False):
        layer = layer_of([1, 3, 5])
        for name in ("w13_weight", "w2_weight"):
            layer._parameters[name] = UninitializedParameter(requires_grad=False)
        evidence.watch(layer, True)
        if filled:
            seen = getattr(layer, evidence.EVIDENCE)
            for name, shard in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
                seen.note(name, shard, range(3))
            evidence.check_evidence(layer)
        else:
            with pytest.raises(
                PlacementError, match="nothing was seen to be put into its parameters"
            ):
                evidence.check_evidence(layer)


def test_a_signature_adds_up_and_knows_no_order_but_every_other_difference():
    rows = torch.randn(5, 8, 6)
    whole = evidence.signature(rows)
    assert whole.equal(sum(evidence.signature(part) for part in rows.chunk(2, dim=1)))
    assert whole.equal(evidence.signature(rows.transpose(1, 2)))
    padded = torch.zeros(5, 9, 9)
    padded[:, :8, :6] = rows
    assert whole.equal(evidence.signature(padded))
    assert len({tuple(row) for row in whole.tolist()}) == 5
    rows[2, 3, 4] *= -1
    assert whole.ne(evidence.signature(rows)).any(dim=1).tolist() == [False, False, True] + 2 * [
        False
    ]
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.bfloat16):
        assert evidence.signature(torch.ones(2, 3).to(dtype)).shape == (2, 2)


NAME = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    "mine, rank, picks",
    [([5, 0, 3], 0, "block"), ([2, 1, 4], 1, "block"), ([5, 0, 3], 0, "ascending")],
)
def test_rows_are_where_the_model_looks_for_them(mine, rank, picks):
    layer = layer_of(mine, rank)
    whole = torch.randn(EXPERTS, 2, 3)
    ((name, found),) = stacked.rows_in_order(
        [(NAME, whole)], {layer.layer_name: layer}, {layer.layer_name: picks}
    )
    rows = range(3 * rank, 3 * rank + 3) if picks == "block" else sorted(mine)
    assert name == NAME and found[list(rows)].equal(whole[mine])


def test_a_model_that_takes_one_expert_at_a_time_gets_its_own():
    layer = layer_of([5, 0, 3, 1])
    whole = torch.randn(EXPERTS, 2, 3)
    found = list(
        stacked.rows_in_order(
            [(NAME + "_blocks", whole), ("model.layers.0.mlp.router.weight", whole[0])],
            {layer.layer_name: layer},
            {},
            frozenset({layer.layer_name}),
        )
    )
    assert [name for name, _ in found] == [
        *(f"model.layers.0.mlp.experts.{e}.gate_up_proj_blocks" for e in (5, 0, 3, 1)),
        "model.layers.0.mlp.router.weight",
    ]
    assert all(t.equal(whole[e]) for (_, t), e in zip(found, (5, 0, 3, 1)))


def test_ranks_of_unequal_size_are_refused_for_a_model_that_copies_equal_parts():
    layer = layer_of([5, 0, 3, 1])
    with pytest.raises(PlacementError, match="copied in 2 equal parts.*holds 4 of 6 experts"):
        stacked.permuted(layer, NAME, torch.randn(EXPERTS, 2), "block")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.3.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.e_score_correction_bias",
        "model.layers.1.mlp.experts.gate_up_proj",
    ],
)
def test_other_tensors_are_left_alone(name):
    layer = layer_of([5, 0, 3])
    assert stacked.stacked_layer(name, torch.ones(EXPERTS, 2), {"x": layer}) is None
    assert stacked.stacked_layer(NAME, torch.ones(EXPERTS, 2), {layer.layer_name: layer}) is layer
    assert stacked.stacked_layer(NAME, torch.ones(4, 2), {layer.layer_name: layer}) is None


@pytest.mark.parametrize("looked_at", [True, False])
def test_a_model_that_was_never_looked_at_is_refused(looked_at):
    model = Model(layer_of([1, 3, 5]))
    if looked_at:
        reload.serve(model)
    plan = Placement([[1, 3, 5, 0, 2, 4]], 6, (3, 3))
    config = SimpleNamespace(
        additional_config={KEY: Carried(make_settings("zigzag", plan, 2))},
        load_config=SimpleNamespace(load_format="gguf"),
    )
    runner = SimpleNamespace(get_model=lambda: model)
    load = loading._worker_load_model(lambda self: None)
    worker = SimpleNamespace(vllm_config=config, model_runner=runner)
    if looked_at:
        load(worker)
    else:
        with pytest.raises(
            PlacementError, match="--load-format gguf loaded Model in a way of its own"
        ):
            load(worker)


@pytest.mark.parametrize(
    "other, exact, message",
    [
        ({"model.layers.1.mlp.experts": (1, 6)}, True, None),
        ({}, True, "the plan has layer 1"),
        ({}, False, None),
    ],
)
def test_pipeline_stages_are_checked_together(monkeypatch, other, exact, message):
    import torch.distributed as dist
    from vllm.distributed import parallel_state

    def gather(parts, mine, group):
        parts[:] = [mine, other]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: group)
    plan = Placement([[1, 3, 5, 0, 2, 4]] * 2, 6, (3, 3), (0, 1))
    settings = make_settings("eplb", plan, 2, exact=exact)
    mine = {"model.layers.0.mlp.experts": (0, 6)}
    if message is None:
        loading._check_coverage(loading._of_all_stages(mine), settings)
    else:
        with pytest.raises(PlacementError, match=message):
            loading._check_coverage(loading._of_all_stages(mine), settings)
    other.clear()
    with pytest.raises(PlacementError, match="no MoE layer of vLLM's own kind"):
        loading._report({}, settings, True, stages=2)


@pytest.mark.parametrize("architecture", support.EXPERTS_OF_THEIR_OWN)
def test_models_whose_experts_are_not_vllms_are_refused_before_they_load(architecture):
    named = support.Combination(architecture=architecture)
    with pytest.raises(PlacementError, match=f"^--flag: {architecture}: vLLM holds its experts"):
        support.check(support.PLACEMENT_RULES, named, "--flag")
