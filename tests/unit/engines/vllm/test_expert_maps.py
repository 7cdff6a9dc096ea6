"""Static placement against the installed vLLM's own classes, without an engine."""

from __future__ import annotations

import importlib
import json
import pickle
import signal
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.vllm import cpu, expert_maps, kernels, loading, support  # noqa: E402
from tests.support.children import python, run_child  # noqa: E402
from tests.support.paths import ROOT
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # imports vLLM, starts no engine

PLAN = Placement([[5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]], 6, (3, 3), (1, 2))


@pytest.fixture
def settings():
    return make_settings("eplb", PLAN, 2)


def test_maps_are_made_on_torchs_default_device(settings):
    """vLLM builds the model under the accelerator's device context; a map on another device crashes the kernel."""
    with torch.device("meta"):
        local, expert_map, mask = expert_maps._map_tensors(PLAN.expert_map(0, 1), 1, True)
    assert local == 3 and expert_map.device.type == mask.device.type == "meta"


def test_masks_and_shared_experts_have_vllms_form():
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    linear = Placement([[0, 1, 2, 3, 4, 5]], 6, (3, 3))
    for rank in range(2):
        ours = expert_maps._map_tensors(linear.expert_map(0, rank), 2, True)
        theirs = determine_expert_map(2, rank, 6, "linear", 2, True)
        assert (
            ours[0] == theirs[0]
            and torch.equal(ours[1], theirs[1])
            and torch.equal(ours[2], theirs[2])
        )


class Manager:
    global_num_experts, ep_size, ep_rank = 6, 2, 1
    moe_parallel_config = type("Config", (), {"all2all_backend": "deepep_low_latency"})


def test_routing_tables(settings):
    to_physical, to_global, local = expert_maps._routing_tables(settings, 2, Manager)
    assert to_global.tolist() == [0, 2, 4, 1, 3, 5] and local.tolist() == [1, 3, 5]
    assert to_physical[to_global].tolist() == list(range(6))
    assert to_physical.tolist() == [0, 3, 1, 4, 2, 5, -1]
    uneven = make_settings("eplb", Placement([[0, 1, 2, 3, 4, 5]], 6, (4, 2), (2,)), 2)
    with pytest.raises(PlacementError, match="same number of experts on every rank"):
        expert_maps._routing_tables(uneven, 2, Manager)


def test_a_padded_token_finds_no_expert_in_the_routing_tables(settings, monkeypatch):
    """By the method of vLLM that reads the table; its own table, one entry shorter, sends the token to the last expert."""
    monkeypatch.setitem(sys.modules, "deep_ep", MagicMock())  # the method calls none of it
    module = importlib.import_module(
        "vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll"
    )
    monkeypatch.delitem(sys.modules, module.__name__)  # it holds the stand-in
    back_end = module.DeepEPLLPrepareAndFinalize.__new__(module.DeepEPLLPrepareAndFinalize)
    back_end.global_to_physical = expert_maps._routing_tables(settings, 2, Manager)[0]
    ids = torch.tensor([[5, 0], [-1, -1]])
    assert back_end._map_global_to_physical_ids(ids).tolist() == [[5, 0], [-1, -1]]
    back_end.global_to_physical = back_end.global_to_physical[:-1]  # the fault
    assert back_end._map_global_to_physical_ids(ids).tolist() == [[5, 0], [5, 5]]


def test_routing_tables_have_no_room_for_fused_shared_experts(settings):
    """Their ids begin behind the last expert, where the sentinel lies: their tokens would go nowhere without a word."""
    shared = type("Manager", (Manager,), {"num_fused_shared_experts": 1})
    with pytest.raises(PlacementError, match="1 fused shared experts"):
        expert_maps._routing_tables(settings, 2, shared)


def test_round_robin_routing_tables_are_vllms_own():
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    stock = ExpertMapManager.__new__(ExpertMapManager)
    stock.global_num_experts, stock.num_fused_shared_experts, stock._local_num_experts = 6, 0, 3
    stock.moe_parallel_config = type("Config", (), {"ep_size": 2, "ep_rank": 1})
    zigzag = make_settings("zigzag", Placement([[0, 2, 4, 1, 3, 5]], 6, (3, 3), (2,)), 2)
    to_physical, *others = expert_maps._routing_tables(zigzag, 2, Manager)
    theirs = stock._init_round_robin_expert_routing_tables()
    for ours, its in zip((to_physical[:-1], *others), theirs, strict=True):
        assert torch.equal(ours, its)


def test_the_weight_filter_keeps_exactly_the_experts_of_each_layer(settings):
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    skip = expert_maps._should_skip_weight(should_skip_weight)
    local = expert_maps.LocalExperts(settings, 6, 2, 0)
    assert (
        local == {0, 2, 3, 4, 5}
        and local.of_layer(1) == {3, 4, 5}
        and local.of_layer(2) == {0, 2, 4}
    )
    for layer in (1, 2):
        kept = {
            e
            for e in range(6)
            if not skip(f"model.layers.{layer}.mlp.experts.{e}.gate_proj.weight", local)
        }
        assert kept == set(local.of_layer(layer))
    assert not skip(
        "mtp.layers.1.mlp.experts.0.gate_proj.weight", local
    )  # cannot be told for sure: read
    assert not skip("model.layers.1.self_attn.q_proj.weight", local)
    assert not skip("model.layers.1.mlp.experts.0.gate_proj.weight_scale", local)
    assert skip("model.layers.1.mlp.experts.0.gate_proj.weight", {1})
    again = pickle.loads(pickle.dumps(local))
    assert again.of_layer(1) == local.of_layer(1) and again == local


def test_stock_round_robin_filter_would_drop_weights():
    """The upstream corruption: the filter goes by the flag, the layers fell back to linear."""
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
    from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids

    _, in_force, _ = determine_expert_map(2, 0, 30, "linear")
    filtered = compute_local_expert_ids(30, 2, 0, "round_robin")
    assert set(np.flatnonzero(in_force.numpy() >= 0)) - filtered, (
        "vLLM has fixed it: the weight-filter patch can go"
    )


class Layer:
    """A loaded MoE layer as far as the report looks at it."""

    def __init__(self, plan, row, rank=0):
        config = type("Config", (), {"needs_round_robin_routing_tables": False})
        self.expert_map_manager = type("M", (), {
            "ep_rank": rank, "ep_size": 2, "global_num_experts": 6, "moe_parallel_config": config,
            "expert_map": torch.tensor(plan.expert_map(row, rank)),
        })  # fmt: skip
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

        self.quant_method = type("Method", (), {"experts_cls": TritonExperts})()
        self.moe_config = type("Config", (), {"num_logical_experts": 6})


@pytest.mark.parametrize(
    "names, rows, exact, message",
    [
        ((1, 2), (0, 1), True, None),
        (
            (1, 2),
            (1, 0),
            True,
            "model.layers.1.mlp.experts: the expert map in force on EP rank 0 is not the plan's",
        ),
        ((1,), (0,), True, r"the plan has layer 2, the model that was loaded has MoE layers \[1\]"),
        (
            (1, 2, 3),
            (0, 1, 1),
            True,
            r"model.layers.3.mlp.experts is not in the plan \(layers 1..2\)",
        ),
        ((1,), (0,), False, None),  # a strategy that needs no load places whatever layers there are
        ((), (), False, "has no MoE layer of vLLM's own kind"),
    ],
)
def test_what_was_loaded_must_be_what_was_placed(names, rows, exact, message):
    settings = make_settings("eplb", PLAN, 2, exact=exact)
    layers = {f"model.layers.{n}.mlp.experts": Layer(PLAN, row) for n, row in zip(names, rows)}
    if message is None:
        loading._report(layers, settings, main=True)
    else:
        with pytest.raises(PlacementError, match=message):
            loading._report(layers, settings, main=True)
    loading._report(
        {}, settings, main=False
    )  # a draft model, or a pipeline stage without MoE layers


def test_kernels_are_told_by_name_and_by_code():
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.experts.trtllm_bf16_moe import (
        TrtLlmBf16ExpertsMonolithic,
    )

    method = type("Method", (), {})()
    method.experts_cls = TritonExperts
    kernels.check_experts(method, False, "layer")
    method.experts_cls = TrtLlmBf16ExpertsMonolithic
    with pytest.raises(
        PlacementError,
        match="model.layers.1: vLLM chose the MoE kernel TrtLlmBf16ExpertsMonolithic.*--moe-backend",
    ):
        kernels.check_experts(method, False, "model.layers.1")


def test_kernels_that_remap_ids_by_the_map_are_accepted():
    """Refused without need until now: --moe-backend cutlass for NVFP4 and MXFP4, and batched kernels."""
    from vllm.model_executor.layers.fused_moe.experts import cutlass_moe
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutedsl_batched_moe import (
        FlashInferCuteDSLBatchedExperts,
    )

    method = type("Method", (), {})()
    for method.experts_cls in (cutlass_moe.CutlassExpertsFp4, cutlass_moe.CutlassExpertsMxfp4):
        kernels.check_experts(method, False, "layer")
    # In 0.25 and 0.28 these classes are given a map and leave it.
    method.experts_cls = type(
        "CutlassExpertsFp4", (), {"apply": lambda self, topk_ids, expert_map: topk_ids}
    )
    with pytest.raises(PlacementError, match="the MoE kernel CutlassExpertsFp4, which is not"):
        kernels.check_experts(method, False, "layer")
    for method.experts_cls in (
        cutlass_moe.CutlassBatchedExpertsFp8,
        FlashInferCuteDSLBatchedExperts,
    ):
        kernels.check_experts(method, True, "layer")
        with pytest.raises(PlacementError, match="Batched"):  # no routing tables sort its tokens
            kernels.check_experts(method, False, "layer")
    named = support.Combination(all2all="deepep_low_latency", moe_backend="flashinfer_cutedsl")
    support.check(support.PLACEMENT_RULES, named, "--flag")
    for other in (replace(named, all2all=""), replace(named, moe_backend="flashinfer_cutlass")):
        with pytest.raises(PlacementError, match=f"MoE back end {other.moe_backend}: it computes"):
            support.check(support.PLACEMENT_RULES, other, "--flag")


def test_a_padded_token_is_no_token_of_the_last_expert_on_cpu():
    weights, ids = torch.tensor([[0.7, 0.3]]), torch.tensor([[-1, 4]], dtype=torch.int32)
    expert_map = torch.tensor(PLAN.expert_map(0, 0))
    assert expert_map[5] >= 0  # what index -1 finds is here
    found = cpu.to_local(weights, ids, expert_map)
    assert torch.equal(found[0], torch.tensor([[0.0, 0.3]])) and found[1].tolist() == [[0, 1]]


def test_every_class_of_cpu_experts_has_a_patch_that_fits():
    from moe_placement_plugin.engines.common.patching import PatchSet

    patches = cpu.cpu_patches()
    assert PatchSet(patches).check() == []
    assert any("CPUUnquantizedExperts" in p.name for p in patches) and len(patches) >= 5


def test_cpu_experts_get_local_slots_and_silent_strangers():
    seen = {}

    def apply(self, output, topk_weights, topk_ids, expert_map, apply_router_weight_on_input=False):
        seen.update(weights=topk_weights, ids=topk_ids)

    ids = torch.tensor([[5, 0], [1, 4]], dtype=torch.int32)
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    expert_map = torch.tensor(PLAN.expert_map(0, 0))
    cpu._modular(apply)(None, None, weights, ids, expert_map)
    assert seen["ids"].tolist() == [[0, 0], [0, 1]] and seen["ids"].dtype == torch.int32
    assert torch.equal(seen["weights"], torch.tensor([[0.7, 0.0], [0.0, 0.4]]))
    cpu._modular(apply)(None, None, weights, ids, None)
    assert seen["ids"] is ids
    with pytest.raises(NotImplementedError):
        cpu._modular(apply)(None, None, weights, ids, expert_map, apply_router_weight_on_input=True)


def test_a_weight_that_went_into_the_input_does_not_bring_an_answer_from_another_rank():
    def apply(self, output, topk_weights, topk_ids, expert_map, apply_router_weight_on_input=False):
        output.fill_(7.0)

    output, ids = torch.empty(3, 2), torch.tensor([[5], [0], [-1]], dtype=torch.int32)
    expert_map = torch.tensor(PLAN.expert_map(0, 0))
    local = (expert_map[[5, 0]] >= 0).tolist()
    cpu._modular(apply)(
        None, output, torch.ones(3, 1), ids, expert_map, apply_router_weight_on_input=True
    )
    assert output.tolist() == [[7.0, 7.0] if here else [0.0, 0.0] for here in (*local, False)]
    assert sorted(local) == [False, True]


def test_monolithic_cpu_experts_get_them_from_their_own_routing():
    ids, weights = torch.tensor([[5, 0]], dtype=torch.int32), torch.tensor([[0.7, 0.3]])
    select = cpu._select_experts(lambda: (weights, ids))
    apply = cpu._monolithic(lambda self, router_logits, expert_map: select())
    got = apply(None, None, torch.tensor(PLAN.expert_map(0, 0)))
    assert got[1].tolist() == [[0, 0]] and torch.equal(got[0], torch.tensor([[0.7, 0.0]]))
    assert select()[1] is ids  # nothing is left behind


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_real_quantized_cpu_kernels_add_up_over_ranks(kind):
    """One bfloat16 rounding per rank lies between the sum of two ranks and one; a wrong expert is as far off as the values are large."""
    finished = run_child(python("-m", "tests.support.cpu_kernels_child", kind), 120, cwd=ROOT)
    lines = [line for line in finished.output.splitlines() if line.startswith("ANSWER ")]
    for line in finished.output.splitlines():
        if line.startswith("LACKS "):
            pytest.skip(f"the library that vLLM loaded has no operator {line[6:]}")
    if finished.code == -signal.SIGILL:
        pytest.skip("this processor lacks an instruction of vLLM's quantized kernels")
    assert lines, finished.output
    answer = json.loads(lines[-1][7:])
    assert answer["difference"] < answer["scale"] * 2**-7
    assert answer["wrong"] > 50 * answer["difference"]


def test_patches_apply_and_undo_on_the_installed_vllm():
    import inspect

    from moe_placement_plugin.engines.vllm.patches import patch_set

    patches = patch_set()
    before = {p.name: inspect.getattr_static(*p._owner()) for p in patches}
    assert patches.check() == []
    patches.apply()
    patches.apply()
    try:
        assert all(p.state == "applied" for p in patches)
        assert all(inspect.getattr_static(*p._owner()) is not before[p.name] for p in patches)
        assert json.dumps(patches.report())
    finally:
        patches.undo()
    assert {p.name: inspect.getattr_static(*p._owner()) for p in patches} == before


def test_the_flags_undo_themselves():
    from vllm.config.parallel import ParallelConfig

    from moe_placement_plugin.engines.vllm.flags import FLAGS

    FLAGS.apply()
    FLAGS.apply()
    try:
        assert (
            ParallelConfig(expert_placement_strategy="zigzag").expert_placement_strategy == "zigzag"
        )
    finally:
        FLAGS.undo()
    with pytest.raises(ValueError, match="linear"):
        ParallelConfig(expert_placement_strategy="zigzag")
