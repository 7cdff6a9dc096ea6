"""Test layers, routing and the CPU engine's experts, without an engine."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import (
    carrier,
    combination,
    cpu,
    direct,
    kernel_configs,
    loading,
    patches,
    routing,
)
from moe_placement_plugin.engines.sglang.state import STATE, settings_of
from tests.support.sglang_settings import make_settings


@pytest.fixture
def placed():
    """Put a placement of 4 experts in 6 slots on 2 ranks for layer 1 into force in this process."""
    placement = Placement([[3, 1, 0, 2, 0, 3]], 4, (3, 3), (1,))
    STATE.settings = make_settings("custom", placement)
    yield placement
    STATE.settings = None


def make_layer(num_experts: int, hidden: int = 8, width: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return types.SimpleNamespace(
        num_experts=num_experts,
        num_local_experts=num_experts,
        w13_weight=torch.randn(num_experts, 2 * width, hidden, generator=generator),
        w2_weight=torch.randn(num_experts, hidden, width, generator=generator),
    )


def silu_and_mul(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_skip_remote_slots_add_up_to_the_whole_layer(tokens, ranks, monkeypatch):
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    # SGLang's own wants a running server's configuration.
    monkeypatch.setattr(fused_moe_native, "SiluAndMul", lambda: silu_and_mul)
    original = getattr(moe_forward_native, "__wrapped__", moe_forward_native)
    experts, k = 8, 3
    whole = make_layer(experts)
    config = MoeRunnerConfig(activation="silu")
    x = torch.randn(tokens, 8)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).to(torch.int32)
    weights = torch.rand(tokens, k)
    expected = original(whole, x, StandardTopKOutput(weights, ids, None), config)
    total = torch.zeros_like(expected)
    per_rank = experts // ranks
    for rank in range(ranks):
        begin = rank * per_rank
        here = (ids >= begin) & (ids < begin + per_rank)
        local = types.SimpleNamespace(
            num_experts=experts,
            num_local_experts=per_rank,
            w13_weight=whole.w13_weight[begin : begin + per_rank],
            w2_weight=whole.w2_weight[begin : begin + per_rank],
        )
        output = StandardTopKOutput(weights, torch.where(here, ids - begin, -1), None)
        total += cpu.skip_remote_slots(original, local, x, output, config)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_tokens_without_any_local_slot_get_zeros():
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    output = StandardTopKOutput(torch.ones(2, 2), torch.full((2, 2), -1), None)
    result = cpu.skip_remote_slots(
        lambda *_: pytest.fail("no token is local"), make_layer(4), torch.ones(2, 8), output, None
    )
    assert result.shape == (2, 8) and not result.any()


def test_local_slots_repeats_no_slot_and_keeps_the_weights():
    ids = torch.tensor([[2, -1, 0], [-1, -1, -1], [-1, 1, -1]])
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, 1.0, 1.0], [0.1, 0.9, 0.0]])
    rows, slots, kept = cpu.local_slots(ids, weights, 3)
    assert rows.tolist() == [0, 2]
    for row, (slot, weight) in enumerate(zip(slots.tolist(), kept.tolist(), strict=True)):
        assert len(set(slot)) == 2
        assert {s: round(w, 3) for s, w in zip(slot, weight, strict=True) if w} == [
            {2: 0.5, 0: 0.2},
            {1: 0.9},
        ][row]


def test_torch_compiles_experts_of_all_ranks_add_up_to_the_whole_layer():
    """Run `fused_moe_forward_native` for the one token that SGLang compiles it for.

    By itself it takes -1 for the last slot of a rank.
    """
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    original = getattr(fused_moe_forward_native, "__wrapped__", fused_moe_forward_native)
    whole, x, weights, ids = (
        make_layer(8),
        torch.randn(1, 8),
        torch.rand(1, 3),
        torch.tensor([[6, 1, 3]], dtype=torch.int32),
    )
    whole.moe_runner_config = MoeRunnerConfig(activation="silu")

    def rank_of(layer, ids):
        return layer, StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, None))

    expected, found, stock = original(*rank_of(whole, ids)).hidden_states, 0, 0
    for begin in (0, 4):
        layer = types.SimpleNamespace(moe_runner_config=whole.moe_runner_config)
        layer.w13_weight, layer.w2_weight = (
            whole.w13_weight[begin : begin + 4],
            whole.w2_weight[begin : begin + 4],
        )
        local = torch.where((ids >= begin) & (ids < begin + 4), ids - begin, -1)
        found += cpu.weigh_remote_slots_nothing(original, *rank_of(layer, local)).hidden_states
        stock += original(*rank_of(layer, local)).hidden_states
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (stock - expected).abs().max() > 0.1, "SGLang heeds -1 now: drop the hook"


def test_redundant_slots_are_added_to_layers_that_leave_them_out(placed):
    built = []

    def original(self, num_experts, hidden_size, layer_id, num_fused_shared_experts=0):
        built.append(num_experts)

    layer = torch.nn.Module()
    loading.build(original, layer, num_experts=4, hidden_size=8, layer_id=1)
    loading.build(original, layer, 6, 8, 1)  # counts them itself
    loading.build(
        original, layer, num_experts=5, hidden_size=8, layer_id=1, num_fused_shared_experts=1
    )
    STATE.settings = None
    loading.build(original, layer, num_experts=4, hidden_size=8, layer_id=1)
    assert built == [6, 6, 7, 4]


def test_a_layer_built_with_other_slots_is_refused(placed):
    layer = types.SimpleNamespace(layer_id=1, _num_global_routed=4, moe_ep_size=2)
    with pytest.raises(
        PlacementError, match="built with 4 slots on 2 ranks, the placement has 6 on 2"
    ):
        loading._check_experts("mlp", layer, placed)
    layer = types.SimpleNamespace(layer_id=0, _num_global_routed=6, moe_ep_size=2)
    with pytest.raises(PlacementError, match="mlp is layer 0, which the placement leaves out"):
        loading._check_experts("mlp", layer, placed)


def test_a_quantization_with_a_loader_of_its_own_is_refused_by_its_class():
    method = type("QuarkInt4Fp8MoEMethod", (), {})()
    with pytest.raises(PlacementError, match="mlp is quantized by QuarkInt4Fp8MoEMethod"):
        loading._check_method("mlp", types.SimpleNamespace(quant_method=method))
    loading._check_method("mlp", types.SimpleNamespace(quant_method=object()))


def dispatch_info(placement: Placement):
    slots_of = torch.from_numpy(placement.logical_to_physical[0].astype(np.int64))
    return types.SimpleNamespace(
        ep_dispatch_algorithm="dynamic",
        rank_invariant=True,
        partial_logical_to_all_physical_map=slots_of,
        partial_logical_to_all_physical_map_num_valid=(slots_of != -1).sum(-1),
        num_physical_experts=placement.num_slots,
    )


def test_replicas_are_picked_by_row_as_sglang_does_from_0_5_17(placed, monkeypatch):
    from sglang.srt.eplb import expert_location_dispatch as stock
    from sglang.srt.layers.moe import utils

    from moe_placement_plugin.engines.sglang import compat

    monkeypatch.setattr(
        utils, "get_moe_a2a_backend", lambda: types.SimpleNamespace(is_none=lambda: True)
    )
    info = dispatch_info(placed)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(40)]).to(
        torch.int32
    )
    ours = routing.pick_by_row(lambda *_: pytest.fail("random pick"), ids, info)
    assert ours.dtype == ids.dtype
    table = torch.from_numpy(placed.physical_to_logical[0].astype(np.int64))
    assert torch.equal(table[ours.long()], ids.long())
    assert set(ours.flatten().tolist()) == set(range(6))  # every replica is used
    if compat.dispatch_is_rank_invariant():
        assert torch.equal(ours, stock._topk_ids_logical_to_physical_dynamic(ids, info))


def test_a_padded_token_goes_to_no_expert(placed, monkeypatch):
    """Plant -1, which as an index is the last expert, in every table of ours."""
    from sglang.srt.layers.moe import utils

    none = types.SimpleNamespace(is_none=lambda: True)
    monkeypatch.setattr(utils, "get_moe_a2a_backend", lambda: none)
    info = dispatch_info(placed)
    info.ep_dispatch_algorithm = "static"
    info.partial_logical_to_rank_dispatch_physical_map = info.partial_logical_to_all_physical_map[
        :, 0
    ]
    ids = torch.tensor([[3, 0], [-1, -1]])
    assert routing._remap(ids, 0, info).tolist() == [[0, 2], [-1, -1]]
    assert routing._remap(torch.tensor([[3, 4], [-1, -1]]), 1, info).tolist() == [[0, 6], [-1, -1]]
    picked = routing.pick_by_row(lambda *_: pytest.fail("random pick"), ids, info)
    assert picked[1].tolist() == [-1, -1] and placed.physical_to_logical[0][picked[0]].tolist() == [
        3,
        0,
    ]
    even = Placement([[3, 1, 0, 2]], 4, (2, 2), (1,))
    for rank, expected in enumerate(([-1, 1, -1, 0, -1], [0, -1, 1, -1, -1])):
        table = direct.local_slots(even, 1, rank)
        assert table.dtype == np.int32 and table.tolist() == expected
        assert table[-1] == -1


def test_shared_experts_follow_the_redundant_slots(placed, monkeypatch):
    info = dispatch_info(placed)
    info.ep_dispatch_algorithm = "static"
    info.partial_logical_to_rank_dispatch_physical_map = info.partial_logical_to_all_physical_map[
        :, 0
    ]
    ids = torch.tensor([[3, 0, 4], [1, 2, 4]])
    assert routing._remap(ids, 1, info).tolist() == [[0, 2, 6], [1, 3, 6]]


def test_the_dispatch_information_is_there_before_the_router_runs(placed, monkeypatch):
    monkeypatch.setattr(routing, "_dispatch_info", lambda config: "info")
    seen = []

    def original(
        hidden_states, router_logits, topk_config, *, expert_location_dispatch_info=None, **rest
    ):
        seen.append(expert_location_dispatch_info)

    config = types.SimpleNamespace(torch_native=False)
    routing.select(original, None, None, config)
    routing.select(
        original,
        hidden_states=None,
        router_logits=None,
        topk_config=config,
        expert_location_dispatch_info="model's",
    )
    routing.select(original, None, None, types.SimpleNamespace(torch_native=True), layer_id=1)
    assert seen == ["info", "model's", None]


def test_one_look_up_where_the_dispatcher_has_the_placements_table(placed):
    """Use neither a model's dispatch information nor ours where one look-up does.

    Both are used again when SGLang makes a table of its own.
    """
    seen = []

    def router(hidden_states, router_logits, topk_config, **rest):
        seen.append(rest["expert_location_dispatch_info"])

    def after(ids, weights, config, logits, layer, padded, info, **rest):
        seen.append(info)
        return ids, weights, ids

    dispatcher = types.SimpleNamespace(local_expert_mapping=torch.tensor([1, -1, 0, -1]))
    setattr(dispatcher, direct._TABLE, dispatcher.local_expert_mapping)
    experts = types.SimpleNamespace(dispatcher=dispatcher)
    config = types.SimpleNamespace(torch_native=False, num_fused_shared_experts=0)
    setattr(config, direct._EXPERTS, experts)
    info, ids = dispatch_info(placed), torch.tensor([[3, 0]])
    info.ep_dispatch_algorithm = "static"
    info.partial_logical_to_rank_dispatch_physical_map = info.partial_logical_to_all_physical_map[
        :, 0
    ]

    def both():
        routing.select(router, None, None, config, expert_location_dispatch_info=info)
        return routing.post_process(
            after, ids, None, config, None, 1, expert_location_dispatch_info=info
        )[0]

    assert both().tolist() == [[3, 0]] and seen == [None, None]
    dispatcher.local_expert_mapping = None
    assert both().tolist() == [[0, 2]] and seen[2:] == [info, info]
    experts.dispatcher = types.SimpleNamespace(local_expert_mapping=torch.tensor([0, 1, -1, -1]))
    assert both().tolist() == [[0, 2]]


@pytest.mark.parametrize(
    "different",
    [
        {},
        {"a2a_backend": "deepep"},
        {"redundant": 2},
        *(
            {"options": frozenset({option})}
            for option in ("enable_eplb", "expert_distribution_recorder_mode", "elastic_ep_backend")
        ),
    ],
)
def test_one_look_up_only_where_nobody_needs_physical_ids(different):
    assert set(different.get("options", ())) <= set(combination.SWITCHES), (
        "one that nobody looks at"
    )
    assert direct.allowed(combination.Combination("0.5.16", **different)) is not bool(different)


def test_draft_layers_and_other_models_are_left_alone(placed):
    ids, weights = torch.tensor([[0, 1]]), torch.ones(1, 2)
    config = types.SimpleNamespace(num_fused_shared_experts=0)
    result = routing.post_process(lambda i, w, *_: (i, w, i), ids, weights, config, None, 1)
    assert result[0] is ids and result[2] is ids


def test_the_kernels_configuration_is_found_in_spite_of_redundant_experts(
    placed, tmp_path, monkeypatch
):
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as engine

    monkeypatch.setattr(engine, "get_device_name", lambda: "a GPU")
    # A running server's configuration, under its name in 0.5.16 and from 0.5.20 on.
    running = types.SimpleNamespace(enable_deterministic_inference=False)
    running.deterministic = running
    for name in {"get_server_args", "get_exec"} & vars(engine).keys():
        monkeypatch.setattr(engine, name, lambda: running)
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "configs" / "triton_3_1_0"
    folder.mkdir(parents=True)
    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    (folder / engine.get_config_file_name(60, 96, None)).write_text(json.dumps({"1": config}))
    (hook,) = (one for one in patches.placement_set() if one.name == "tuned-with-redundant-experts")
    assert kernel_configs.redundant_per_rank() == 1
    assert hook.check() is None
    original = getattr(engine.get_moe_configs, "__wrapped__", engine.get_moe_configs)
    monkeypatch.setattr(
        engine, "get_moe_configs", lambda *args, **kwargs: hook.hook(original, *args, **kwargs)
    )
    assert original(61, 96, None) is None
    for down in (False, True):
        assert engine.get_moe_configs(
            61, 96, None, 0, 0, per_channel_quant=False, down_moe=down
        ) == {1: config}
    assert engine.get_moe_configs(62, 96, None, 0, 0, per_channel_quant=False) is None


def test_the_settings_go_through_json_and_pickle_on_their_way(placed):
    """Survive both, for SGLang 0.5.16 sends every attribute of ServerArgs to its workers.

    It also answers /server_info with all of them.
    """
    import pickle

    from fastapi.encoders import jsonable_encoder
    from sglang.srt.utils.msgspec_utils import msgspec_to_builtins

    arguments = types.SimpleNamespace(tp_size=2)
    carrier.attach(arguments, make_settings("zigzag", placed, padding=2))
    assert (
        json.dumps(jsonable_encoder(msgspec_to_builtins(vars(arguments))))
        == '{"tp_size": 2, "_moe_placement": "zigzag"}'
    )
    STATE.settings = None
    sent = pickle.loads(pickle.dumps(arguments))
    assert (
        settings_of(sent).plan == placed
        and settings_of(sent).placement.padding == 2
        and STATE.settings is settings_of(sent)
    )
