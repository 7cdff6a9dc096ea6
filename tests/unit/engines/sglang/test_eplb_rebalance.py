"""Test how a rebalance of SGLang's EPLB is planned, exchanged and verified."""

from __future__ import annotations

import logging
import time
import types

import numpy as np
import pytest
import torch

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.tables import inverse_maps
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.engines.sglang import eplb, eplb_exchange, eplb_policy, state
from moe_placement_plugin.engines.sglang.state import STATE
from moe_placement_plugin.exchange.watchdog import Watchdog
from moe_placement_plugin.rebalancing import exchanger
from moe_placement_plugin.rebalancing.exchanger import Exchanger
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from moe_placement_plugin.rebalancing.rebalance import Rebalance
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer
from tests.support.sglang_settings import make_settings

from .test_flags import plugins  # noqa: F401

LAYERS, EXPERTS, RANKS = 3, 8, 2


class Metadata(types.SimpleNamespace):
    """Hold the tables of SGLang's metadata, and its `update`."""

    def update(self, other, update_layer_ids):
        for name in vars(self):
            getattr(self, name)[update_layer_ids] = getattr(other, name)[update_layer_ids]


def metadata(table, usable=None) -> Metadata:
    table = np.array(table)
    to_physical, _ = inverse_maps(table, EXPERTS, usable)
    wide = np.full((*to_physical.shape[:2], table.shape[1]), -1)
    wide[..., : to_physical.shape[2]] = to_physical
    return Metadata(
        physical_to_logical_map_cpu=torch.tensor(table),
        logical_to_all_physical_map_cpu=torch.tensor(wide),
    )


@pytest.fixture
def serving(monkeypatch):
    """Return layers 0 (dense), 1 and 2 of 8 experts in 10 slots on 2 ranks, as SGLang begins."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.eplb import expert_location

    in_force = metadata(np.tile(np.arange(10) % EXPERTS, (LAYERS, 1)))
    monkeypatch.setattr(expert_location, "get_global_expert_location_metadata", lambda: in_force)
    group = types.SimpleNamespace(world_size=2, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_moe_ep_group", lambda: group)
    monkeypatch.setattr(eplb.elastic, "live_ranks", lambda: None)
    monkeypatch.setattr(eplb.eplb_phases, "ranks_that_count_a_token", lambda: 1)
    facts = types.SimpleNamespace(topology=Topology(RANKS))
    monkeypatch.setattr(STATE, "eplb", state.Eplb(facts, None, RebalancePolicy()))
    STATE.settings = make_settings("eplb")
    yield in_force
    STATE.settings = None


def under_way(**policy) -> Rebalance:
    """Begin a rebalance that we plan."""
    planner = Rebalancer(RebalancePolicy(**policy), (1, 2), 1000, logging.getLogger())
    here = STATE.eplb.rebalance = Rebalance(Watchdog(), (1,), planner)
    return here


def planned(counts):
    def theirs(*args):
        raise AssertionError("SGLang's own algorithm was asked")

    return eplb_policy.plan(theirs, torch.tensor(counts), 10, 5, None, 1, None)


def hot(expert: int) -> np.ndarray:
    counts = np.full((4, LAYERS, EXPERTS), 10)
    counts[:, 1, expert] = 100
    counts[:, 0] = 0
    return counts


def test_our_plan_moves_little_and_leaves_what_is_no_moe_layer(serving):
    here = under_way()
    table, to_physical, count = planned(hot(3))
    assert here.decision.rebalance and len(here.exchange.transfers)
    old = serving.physical_to_logical_map_cpu
    assert table[0].equal(old[0]) and table[2].equal(old[2])  # nothing recorded, nothing to gain
    assert int(count[1, 3]) >= 2, "the hot expert has no replica"
    assert 1 <= int((table[1] != old[1]).sum()) <= 4
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            slots = [s for s in to_physical[layer, expert].tolist() if s >= 0]
            assert len(slots) == int(count[layer, expert]) and {
                int(table[layer, s]) for s in slots
            } == {expert}


@pytest.mark.parametrize("counts", [hot(3), np.zeros((4, LAYERS, EXPERTS), dtype=int)])
def test_declined_keeps_the_placement(serving, counts):
    here = under_way(min_gain=0.99)
    table, _, _ = planned(counts)
    assert table.equal(serving.physical_to_logical_map_cpu)
    assert here.decision is None or not here.decision.rebalance


def test_without_strategy_eplb_the_algorithm_is_sglangs(serving):
    STATE.eplb.rebalance = Rebalance(Watchdog())
    assert eplb_policy.plan(lambda *args: args, 1, 2, 3, 4, 5, 6) == (1, 2, 3, 4, 5, 6)


class Recorded(Exchanger):
    """Plan, and move nothing."""

    def __init__(self):
        self.num_experts, self.num_slots, self.ranks = EXPERTS, 5, RANKS
        self.topology = Topology(RANKS)
        self.expert_bytes, self.plans = {1: 100, 2: 100}, []

    def exchange(self, plan, on_commit=None, reader=None, watchdog=None):
        self.plans.append((plan, reader))
        on_commit(tuple(plan.changed_rows.tolist()))


def updated(new, layers=(1, 2)):
    recorded = STATE.eplb.exchanger = Recorded()
    STATE.eplb.viewed = STATE.generation

    def theirs(*args, **kwargs):
        raise AssertionError("SGLang's own exchange was asked")

    assert eplb_exchange.update(theirs, None, {}, new, list(layers), nnodes=1, rank=0) == {}
    return recorded.plans


def test_layers_that_stay_are_passed_over(serving):
    here = under_way()
    table = serving.physical_to_logical_map_cpu.numpy()
    assert not updated(metadata(table)) and not here.moved
    goal = table.copy()
    goal[2] = goal[2][::-1]
    ((plan, reader),) = updated(metadata(goal))
    assert plan.new.layer_ids == (2,) and here.moved == [2] and reader is None
    assert serving.physical_to_logical_map_cpu.tolist() == goal.tolist()


def test_the_exchange_that_was_weighed_is_carried_out_chunk_by_chunk(serving, monkeypatch):
    here = under_way()
    counts = np.full((4, LAYERS, EXPERTS), 10)
    counts[:, 1:, 3] = 100
    table, *_ = planned(counts)
    weighed = here.exchange
    assert weighed.new.layer_ids == (1, 2) and len(weighed.transfers)

    def planned_anew(*args):
        raise AssertionError("the exchange was planned once more")

    monkeypatch.setattr(exchanger, "plan_exchange", planned_anew)
    goal = metadata(table.numpy())
    moves = []
    for number, layer in enumerate((1, 2)):
        ((plan, _),) = updated(goal, [layer])
        moves += [move._replace(row=number) for move in plan.transfers]
    assert moves == list(weighed.transfers) and here.moved == [1, 2]
    assert serving.physical_to_logical_map_cpu.tolist() == table.tolist()


def test_a_table_that_sglang_has_changed_since_is_what_is_exchanged_to(serving):
    """Notice the fault: a weighed exchange leads to a table that nobody asks for any more."""
    here = under_way()
    table, *_ = planned(hot(3))
    assert here.exchange is not None
    goal = table.numpy().copy()
    goal[1] = goal[1][::-1]
    ((plan, _),) = updated(metadata(goal), [1])
    assert plan.new.physical_to_logical.tolist() == [goal[1].tolist()]
    assert serving.physical_to_logical_map_cpu[1].tolist() == goal[1].tolist()


def test_a_dead_rank_gets_no_expert_and_no_token(serving, monkeypatch):
    here = under_way()
    monkeypatch.setattr(eplb.elastic, "live_ranks", lambda: (0,))
    with pytest.raises(PlacementError, match="5 slots for 8 experts"):
        planned(hot(3))
    table = np.tile(
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7], (LAYERS, 1)
    )  # both ranks hold all
    serving.__dict__.update(vars(metadata(table)))
    kept, to_physical, count = eplb_policy.plan(None, torch.tensor(hot(3)), 16, 8, None, 1, None)
    assert kept.tolist() == table.tolist() and not here.decision.rebalance
    assert to_physical.shape[2] == 1 and int(to_physical.max()) == 7 and (count == 1).all()


def test_maps_alone_change_where_a_dead_rank_held_replicas_only(serving):
    here = under_way()
    table = serving.physical_to_logical_map_cpu.numpy()
    goal = metadata(table, usable=np.arange(10) != 8)
    assert not updated(goal) and not here.moved  # nothing moves
    assert serving.logical_to_all_physical_map_cpu[1].equal(goal.logical_to_all_physical_map_cpu[1])
    assert 8 in serving.logical_to_all_physical_map_cpu[0]  # which was not to be updated


class Manager:
    """Answer what `eplb.rebalance` asks of SGLang's manager."""

    def _get_model(self):
        return types.SimpleNamespace(
            routed_experts_weights_of_layer={1: [torch.zeros(5, 2)], 2: [torch.zeros(5, 2)]}
        )


@pytest.fixture
def rebalancing(serving, monkeypatch):
    """Return layers that were checked, for a rebalance in two chunks."""
    checked = []
    monkeypatch.setattr(
        eplb, "recheck", lambda model, what, only, alone: checked.append(list(only))
    )
    monkeypatch.setattr(eplb, "verifies", lambda: True)
    monkeypatch.setattr(eplb.elastic, "may_lose_ranks", lambda: False)
    monkeypatch.setattr(eplb, "renew", lambda model: True)
    STATE.settings = make_settings("eplb", moves=True, plans=True)
    STATE.eplb.policy = RebalancePolicy(watchdog=0.05)
    yield checked
    STATE.settings = None


def chunks(self):
    for layer in (1, 2):
        yield
        STATE.eplb.rebalance.moved.append(layer)


def test_what_moved_is_verified_before_the_next_forward_pass(rebalancing):
    steps = eplb.rebalance(chunks, Manager())
    seen = []
    for _ in steps:
        seen.append(list(rebalancing))
        assert STATE.eplb.rebalance is None, "a forward pass is no part of a rebalance"
    assert seen == [[], [[1]]] and rebalancing == [[1], [2]]


def test_a_damaged_exchange_ends_the_server(rebalancing, monkeypatch):
    def damaged(model, what, only, alone):
        raise PlacementError(what)

    monkeypatch.setattr(eplb, "recheck", damaged)
    with pytest.raises(PlacementError, match="damaged by an exchange"):
        list(eplb.rebalance(chunks, Manager()))
    assert STATE.eplb.rebalance is None


def test_an_exchange_that_does_not_finish_says_what_it_waits_for(rebalancing, caplog):
    def slow(self):
        STATE.eplb.rebalance.waits_for("transfers", (1, 2))
        time.sleep(0.08)
        yield

    with caplog.at_level(logging.WARNING, "moe_placement_plugin.engines.sglang.eplb"):
        list(eplb.rebalance(slow, Manager()))
    assert "waiting for: transfers, layers 1..2, ranks [1]" in caplog.records[0].getMessage()
