"""Test what EPLB is told, without an engine: models, drafts, rules."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.engines.common.options import REBALANCE  # noqa: E402
from moe_placement_plugin.engines.common.patching import PatchSet  # noqa: E402
from moe_placement_plugin.engines.common.request import Request  # noqa: E402
from moe_placement_plugin.engines.vllm import eplb, kernel_configs, layers, resolve  # noqa: E402
from moe_placement_plugin.engines.vllm.combination import Combination  # noqa: E402
from moe_placement_plugin.engines.vllm.eplb import logger  # noqa: E402
from moe_placement_plugin.engines.vllm.eplb_policy import planner_policy  # noqa: E402
from moe_placement_plugin.engines.vllm.state import (  # noqa: E402
    STATE,  # noqa: E402
    Eplb,
    EplbModel,
)
from moe_placement_plugin.engines.vllm.support import VERIFICATION_RULES, check  # noqa: E402
from moe_placement_plugin.exchange.watchdog import Watchdog  # noqa: E402
from moe_placement_plugin.rebalancing.exchanger import ExchangeLimits  # noqa: E402
from moe_placement_plugin.rebalancing.rebalance import Rebalance  # noqa: E402
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer, policy_from  # noqa: E402
from tests.support.vllm_settings import make_settings  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def policy(*shapes, **rules):
    """Return our policy for models of these (layers, experts), whose rebalance has begun."""
    models = []
    for layers_and_experts in shapes:
        of_vllm = SimpleNamespace(logical_replica_count=torch.ones(layers_and_experts))
        rows = range(layers_and_experts[0])
        planner = Rebalancer(policy_from(rules, REBALANCE.flag), rows, 1000, logger)
        rebalance = Rebalance(Watchdog(), rebalancer=planner)
        models.append(EplbModel(of_vllm, rebalancer=planner, rebalance=rebalance))
    return planner_policy(Eplb(None, 30.0, ExchangeLimits(), models))


def tables(rows, experts, slots):
    return torch.arange(slots).remainder(experts).expand(rows, slots).clone()


def test_a_model_and_its_draft_have_a_planner_each():
    ours = policy((3, 8), (1, 8), min_gain=0.0, hysteresis=0.0)
    skewed = torch.tensor([[500, 400, 300, 200, 100, 10, 10, 10]])
    for rows in (3, 1):
        old = tables(rows, 8, 10)
        new = ours.rebalance_experts(skewed.expand(rows, -1), 10, 1, 1, 2, old)
        assert new.shape == old.shape and not new.equal(old)
        load = skewed[0].double() / torch.bincount(new[0], minlength=8)
        by_rank = load[new[0]].view(2, 5).sum(1)
        assert by_rank.max() / by_rank.mean() < 1.05


def test_a_model_that_is_not_planned_stays_where_it_is_and_so_does_one_without_load():
    ours, old = policy((3, 8)), tables(2, 8, 10)
    assert ours.rebalance_experts(torch.ones(2, 8), 10, 1, 1, 2, old).equal(old)
    assert ours.rebalance_experts(torch.zeros(3, 8), 10, 1, 1, 2, tables(3, 8, 10)).equal(
        tables(3, 8, 10)
    )


def test_our_policy_has_the_signature_of_vllms():
    from vllm.distributed.eplb.policy.abstract import AbstractEplbPolicy

    ours, theirs = (
        list(inspect.signature(p.rebalance_experts).parameters)
        for p in (policy(), AbstractEplbPolicy)
    )
    assert ours == theirs


def test_where_ranks_come_or_go_all_is_planned_whether_it_pays_or_not():
    ours, load = policy((3, 8), min_gain=0.99), torch.full((3, 8), 100.0)
    new = ours.rebalance_experts(load, 12, 1, 1, 3, tables(3, 8, 8))  # a rank more
    assert new.shape == (3, 12) and new.dtype == torch.int64
    coming = tables(3, 8, 12)
    coming[:, 8:] = -1
    new = ours.rebalance_experts(load, 12, 1, 1, 3, coming)
    assert all(set(row) == set(range(8)) for row in new.tolist())
    assert ours.rebalance_experts(load, 12, 1, 1, 3).shape == (3, 12)


def test_what_does_not_pay_is_declined():
    old = tables(3, 8, 8)
    nearly = torch.tensor([[100, 101, 100, 99, 100, 100, 101, 99]]).expand(3, -1)
    assert policy((3, 8)).rebalance_experts(nearly, 8, 1, 1, 2, old).equal(old)


def test_layers_are_numbered_by_their_own_index_where_it_is_theirs_alone():
    names = [
        "model.layers.3.mlp.experts",
        "vision_model.layers.3.mlp.experts",
        "model.layers.4.mlp.experts",
        "mtp.layers.0.mlp.experts",
    ]
    assert layers.numbered(dict.fromkeys(names)) == dict(zip(names, (-1, -2, 4, -4)))


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"nonsense": 1}, "'nonsense' is not one of min_gain"),
        ({"min_gain": "0.02"}, "min_gain '0.02': give a number"),
        ({"min_gain": 2}, "min_gain 2: give a share of at least 0 and below 1"),
        ({"small_batches": "no"}, "small_batches 'no': give true or false"),
        ({"tokens_per_step": 5}, "tokens_per_step 5: give tokens by phase"),
        ({"watchdog": 0}, "watchdog 0: give a positive number"),
        ([1], "give a JSON object"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    with pytest.raises(PlacementError, match=message):
        policy_from(rules, REBALANCE.flag)


def test_rules_without_anything_that_rebalances_are_refused():
    with pytest.raises(
        PlacementError,
        match="--expert-rebalance without --enable-eplb and --expert-placement-strategy eplb",
    ):
        resolve._check_rebalance(Request(rebalance={"min_gain": 0.1}), Combination(eplb=True))


def test_dummy_weights_are_not_verified():
    dummy = Combination(load_format="dummy")
    for asked in (None, "off"):
        assert not resolve._verification(Request("zigzag", places=True, verify=asked), dummy).on
    asked = resolve._verification(Request("zigzag", places=True, verify="replicas"), dummy)
    with pytest.raises(PlacementError, match="--flag with --load-format dummy: weights are random"):
        check(VERIFICATION_RULES, dummy, "--flag")
    assert asked.on and asked.asked


def test_the_first_table_is_vllms():
    manager = SimpleNamespace(
        global_num_experts=10,
        expert_map=torch.tensor([-1] * 5 + [0, 1, 2, 3, 4]),
        num_fused_shared_experts=0,
    )
    layer = SimpleNamespace(
        moe_config=SimpleNamespace(num_logical_experts=8),
        expert_map_manager=manager,
        local_num_experts=5,
    )
    np.testing.assert_array_equal(layers.slot_experts(layer), [5, 6, 7, 0, 1])
    state = SimpleNamespace(physical_to_logical_map=torch.tensor([[7, 6, 5, 4, 3, 2, 1, 0, 0, 1]]))
    setattr(layer, layers.EPLB_ROW, (state, 0))
    np.testing.assert_array_equal(layers.slot_experts(layer), [2, 1, 0, 0, 1])


def test_the_kernels_configuration_is_found_in_spite_of_redundant_experts(tmp_path, monkeypatch):
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
    (tmp_path / fused_moe.get_config_file_name(61, 96, None, None)).write_text(
        json.dumps({"1": config})
    )
    before = STATE.settings
    shapes = (65, 192, 32), (65, 32, 96)
    patches = PatchSet(kernel_configs.tuned_patches())
    try:
        STATE.settings = make_settings("eplb", None, 2, eplb=True, redundant=8)
        untuned = fused_moe.try_get_optimal_moe_config(*shapes, 4, None, 1)
        patches.apply()
        assert fused_moe.try_get_optimal_moe_config(*shapes, 4, None, 1) == config != untuned
        assert patches.hits() == {"tuned-with-redundant-experts": 1}
    finally:
        patches.undo()
        STATE.settings = before
    assert fused_moe.try_get_optimal_moe_config(*shapes, 4, None, 1) == untuned


def test_a_model_without_the_redundant_experts_that_were_asked_for_is_refused():
    placement = Placement([[0, 1, 2, 3, 0, 1]], 4, (3, 3))
    state = SimpleNamespace(model_name="gemma", physical_to_logical_map=torch.arange(4)[None])
    with pytest.raises(PlacementError, match="gemma has 4 slots .* the placement has 6"):
        eplb.check_slots(state, placement)
    eplb.check_slots(state, Placement([[0, 1, 2, 3]], 4, (2, 2)))
