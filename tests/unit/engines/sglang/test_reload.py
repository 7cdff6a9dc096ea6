"""Test new weights for a model that serves, without an engine.

They show what is refused, what is forgotten, and what is made anew.
"""

from __future__ import annotations

import functools
import logging
import types

import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import (
    eplb,
    eplb_exchange,
    evidence,
    expert_reader,
    reload,
    slot_digests,
)
from moe_placement_plugin.engines.sglang.state import STATE, Eplb
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from tests.support.sglang_settings import make_settings


def make_model():
    """Make a model with a ``FusedMoE`` of two slots, and something else."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    class Experts(FusedMoE):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.layer_id, self.num_local_experts, self.num_fused_shared_experts = 1, 2, 0
            for name in ("w13_weight", "w2_weight"):
                memory = torch.randn(2, 3, 4)
                self.register_parameter(name, torch.nn.Parameter(memory, requires_grad=False))

    model = torch.nn.Module()
    model.experts, model.norm = Experts(), torch.nn.Linear(2, 2)
    return model


@pytest.fixture
def runner(monkeypatch):
    """Return a runner of rank 0 of one whose experts are placed and were verified."""
    placement = Placement([[1, 0]], 2, (2,), (1,))
    STATE.settings = make_settings("custom", placement)
    model = make_model()
    object.__setattr__(model, slot_digests._EXPECTED, {1: "as loaded"})
    group = types.SimpleNamespace(cpu_group=None, world_size=1, rank_in_group=0)
    from sglang.srt.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_moe_ep_group", lambda: group)
    monkeypatch.setattr(
        slot_digests,
        "verify_loaded",
        lambda model, clean: object.__setattr__(model, slot_digests._EXPECTED, {1: "anew"}),
    )
    yield types.SimpleNamespace(
        model=model, is_draft_worker=False, server_args=types.SimpleNamespace()
    )
    STATE.settings = None
    evidence.forget()


def updater(runner):
    return types.SimpleNamespace(get_model_runner=lambda: runner)


def from_tensor(runner, names, load_format=None, does=lambda: (True, "Success")):
    """Update by SGLang's `update_weights_from_tensor`.

    Returns:
        What it answers, and what reached the original.
    """
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    seen = []

    @functools.wraps(WeightUpdater.update_weights_from_tensor)
    def original(self, named_tensors, load_format=None):
        seen.append(named_tensors)
        return does()

    named = [(name, None) for name in names]
    answer = reload.update(
        "update_weights_from_tensor", original, updater(runner), named, load_format=load_format
    )
    return answer, seen


@pytest.mark.parametrize("how", ["direct", "a.loader.of.the.user"])
def test_an_update_by_position_is_refused_before_anything_is_written(runner, how):
    (succeeded, message), seen = from_tensor(runner, ["norm.weight", "experts.w2_weight"], how)
    assert not succeeded and not seen
    assert f"load_format {how} copies experts into slots by position" in message
    assert "leave load_format out" in message
    assert slot_digests.digests_known(runner.model), "nothing has changed"


def test_a_direct_update_of_other_tensors_goes_on(runner):
    (succeeded, _), seen = from_tensor(runner, ["norm.weight"], "direct")
    assert succeeded and seen


def test_without_a_placement_nothing_is_refused(runner):
    STATE.settings = None
    (succeeded, _), seen = from_tensor(runner, ["experts.w2_weight"], "direct")
    assert succeeded and seen


def test_digests_of_old_weights_are_forgotten_and_taken_anew(runner):
    before = STATE.generation
    assert from_tensor(runner, ["experts.w2_weight"])[0] == (True, "Success")
    assert STATE.generation == before + 1
    assert not slot_digests.digests_known(runner.model)
    assert slot_digests.renew(runner.model)
    assert getattr(runner.model, slot_digests._EXPECTED) == {1: "anew"}


def test_a_failed_update_is_not_verified_until_the_next_one(runner, caplog):
    from_tensor(runner, [], does=lambda: (False, "out of memory"))
    with caplog.at_level(logging.WARNING):
        assert not slot_digests.renew(runner.model)
    assert "not verified until they are updated again" in caplog.text
    from_tensor(runner, [])
    assert slot_digests.renew(runner.model)


@pytest.mark.parametrize("loads", [True, False])
def test_the_end_of_a_session_makes_no_failed_load_good(runner, loads):
    from_tensor(runner, [], does=lambda: (loads, "a bucket"))
    reload.update(
        "end_weight_update",
        lambda self, *, run_post_load: None,
        updater(runner),
        run_post_load=False,
    )
    assert slot_digests.renew(runner.model) is loads


def test_a_refusal_while_loading_is_an_answer_and_not_the_end(runner):
    def refuse():
        raise PlacementError("layer 1: the loader puts w1 of expert 0 into slot 0")

    (succeeded, message), _ = from_tensor(runner, [], does=refuse)
    assert not succeeded and "the loader puts w1 of expert 0" in message
    assert "update all of them again" in message
    assert not slot_digests.renew(runner.model)


def test_an_error_of_sglangs_own_stays_one(runner):
    def fail():
        raise NotImplementedError("Unknown load_format")

    with pytest.raises(NotImplementedError):
        from_tensor(runner, [], does=fail)
    assert not slot_digests.digests_known(runner.model) and not slot_digests.renew(runner.model)


def test_a_drafts_update_changes_nothing_of_the_target(runner):
    draft = types.SimpleNamespace(model=make_model(), is_draft_worker=True)
    before = STATE.generation
    (succeeded, _), seen = from_tensor(draft, ["experts.w2_weight"], "direct")
    assert succeeded and seen and STATE.generation == before
    assert slot_digests.digests_known(runner.model)


@pytest.mark.parametrize(
    ("saver", "backup", "whole"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_released_weights_are_nobodys_until_they_are_back(runner, saver, backup, whole):
    runner.server_args = types.SimpleNamespace(
        enable_memory_saver=saver, enable_weights_cpu_backup=backup
    )
    manager = types.SimpleNamespace(tp_worker=types.SimpleNamespace(model_runner=runner))
    request = types.SimpleNamespace(tags=["kv_cache"])
    reload.release(lambda *_: "done", manager, request)
    assert slot_digests.digests_known(runner.model), "the weights stayed"
    assert reload.release(lambda *_: "done", manager, types.SimpleNamespace(tags=None)) == "done"
    assert not slot_digests.digests_known(runner.model)
    assert slot_digests.renew(runner.model) is whole


def test_slots_are_not_sent_to_another_server(runner):
    succeeded, message = reload.send(lambda *_: (True, ""), None)
    assert not succeeded and "by position" in message
    STATE.settings = None
    assert reload.send(lambda *_: (True, ""), None) == (True, "")


def test_before_a_rebalance_digests_are_taken_anew(runner, monkeypatch):
    monkeypatch.setattr(eplb, "verifies", lambda: True)
    monkeypatch.setattr(eplb.elastic, "may_lose_ranks", lambda: False)
    from_tensor(runner, [])
    assert eplb._can_verify(runner.model)
    assert getattr(runner.model, slot_digests._EXPECTED) == {1: "anew"}
    from_tensor(runner, [], does=lambda: (False, "out of memory"))
    assert not eplb._can_verify(runner.model), "what moves is not verified, and the server goes on"
    monkeypatch.setattr(eplb, "verifies", lambda: False)
    assert not eplb._can_verify(runner.model)


def test_where_ranks_may_be_dead_updated_weights_are_not_waited_for(runner, monkeypatch):
    monkeypatch.setattr(eplb, "verifies", lambda: True)
    monkeypatch.setattr(eplb.elastic, "may_lose_ranks", lambda: True)
    assert eplb._can_verify(runner.model)
    from_tensor(runner, [])
    assert not eplb._can_verify(runner.model)
    with pytest.raises(PlacementError, match="updated while serving: with --elastic-ep-backend"):
        slot_digests.recheck(runner.model, alone=True)


def test_lost_experts_are_not_read_from_a_checkpoint_that_is_not_served_any_more(
    runner, monkeypatch
):
    STATE.settings = make_settings("custom", STATE.settings.plan, elastic=True)
    monkeypatch.setattr(STATE.names, "known", expert_reader.Names(folder="the old one"))
    from_tensor(runner, [])
    with pytest.raises(PlacementError, match="did not come from a safetensors checkpoint"):
        expert_reader.EngineReader(runner.model, {}).read(1, 0, [])


def test_tensors_that_an_update_replaced_are_found_again(runner):
    """Notice the fault: SGLang's list keeps the tensors of the start."""
    experts = runner.model.experts
    listed = {1: eplb_exchange.slot_tensors(experts)}
    fresh = torch.nn.Parameter(torch.ones(2, 3, 4), requires_grad=False)
    experts.w13_weight = fresh
    now = eplb_exchange.current_tensors(listed, runner.model)[1]
    assert [t.data_ptr() for t in now] == [fresh.data_ptr(), experts.w2_weight.data_ptr()]
    experts.w2_weight = torch.nn.Parameter(torch.ones(2, 6, 2), requires_grad=False)
    with pytest.raises(PlacementError, match="layer 1: an update has replaced weights by others"):
        eplb_exchange.current_tensors(listed, runner.model)


def test_an_exchanger_with_views_of_old_weights_is_made_anew(runner, monkeypatch):
    made = []

    class Made:
        def __init__(self, tensors, experts, group, facts, name, *rest):
            made.append((name, [t.data_ptr() for t in tensors[1]]))

    monkeypatch.setattr(eplb_exchange, "Exchanger", Made)
    known = Eplb(types.SimpleNamespace(stores=object()), runner.model, RebalancePolicy())
    experts, in_force = runner.model.experts, types.SimpleNamespace(num_logical_experts=2)
    listed = {1: eplb_exchange.slot_tensors(experts)}
    first = eplb_exchange.exchanger_of(known, listed, in_force)
    assert eplb_exchange.exchanger_of(known, listed, in_force) is first
    experts.w13_weight = torch.nn.Parameter(torch.ones(2, 3, 4), requires_grad=False)
    from_tensor(runner, [])
    assert eplb_exchange.exchanger_of(known, listed, in_force) is not first
    assert made[1][1][0] == experts.w13_weight.data_ptr() != made[0][1][0]
    assert made[0][0] != made[1][0], "the keys of the one before must not be taken for its own"
