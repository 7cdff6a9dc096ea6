"""One rebalance as one object: what was weighed is what moves, where the engine asks for it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.load import ExpertLoad
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.exchange.watchdog import Watchdog
from moe_placement_plugin.rebalancing import exchanger
from moe_placement_plugin.rebalancing.exchanger import Exchanger
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from moe_placement_plugin.rebalancing.rebalance import Rebalance, other_ranks
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer
from moe_placement_plugin.rebalancing.tables import EngineRanks

LAYERS, EXPERTS, RANKS, SLOTS = 4, 9, 3, 5
IN_FORCE = np.tile(np.arange(RANKS * SLOTS) % EXPERTS, (LAYERS, 1))


class Planner(Exchanger):
    """As much of an exchanger as planning takes."""

    def __init__(self, topology: Topology):
        self.num_experts, self.num_slots, self.ranks = EXPERTS, SLOTS, RANKS
        self.topology = topology
        self.expert_bytes = dict.fromkeys(range(LAYERS), 64)


def rebalance(**rules) -> Rebalance:
    policy = RebalancePolicy(**({"min_gain": 0.0, "hysteresis": 0.0} | rules))
    planner = Rebalancer(policy, range(LAYERS), 60, logging.getLogger(), Topology(RANKS))
    return Rebalance(Watchdog(), (1, 2), planner)


def load() -> ExpertLoad:
    return ExpertLoad(np.random.default_rng(0).zipf(1.4, (1, LAYERS, EXPERTS)).clip(max=400))


@pytest.fixture
def decided():
    """(rebalance, the table that it proposes), two layers of which change at least."""
    found = rebalance()
    table = found.propose(load(), IN_FORCE, EngineRanks(RANKS))
    assert found.decision.rebalance and (table != IN_FORCE).any(axis=1).sum() > 1
    return found, table


def asked(planner: Planner, old, new, rows, weighed, live=None):
    """The exchange of an engine that hands over these tables."""
    return planner.plan(old[rows], new[rows], rows, live, weighed)


@pytest.fixture
def never_planned_anew(monkeypatch):
    def planned(*args):
        raise AssertionError("the exchange was planned once more")

    monkeypatch.setattr(exchanger, "plan_exchange", planned)


def test_the_exchange_that_was_weighed_is_carried_out_whole_or_by_layers(
    decided, never_planned_anew
):
    found, table = decided
    planner = Planner(Topology(RANKS))
    whole = asked(planner, IN_FORCE, table, list(range(LAYERS)), found.exchange)
    assert list(whole.transfers) == list(found.exchange.transfers) != []
    assert whole.expert_bytes.tolist() == [64] * LAYERS, "as it is staged, padding included"
    moves = []
    for row in np.flatnonzero((table != IN_FORCE).any(axis=1)).tolist():
        part = asked(planner, IN_FORCE, table, [row], found.exchange)
        moves += [move._replace(row=row) for move in part.transfers]
    assert moves == list(found.exchange.transfers)


def test_what_the_engine_has_changed_since_is_planned_anew(decided):
    """The fault: a plan that leads to a table that the engine does not ask for."""
    found, table = decided
    planner = Planner(Topology(RANKS))
    rows = list(range(LAYERS))
    changed = table.copy()
    changed[0] = np.roll(table[0], SLOTS)
    for old, new in ((IN_FORCE, changed), (changed, table)):
        plan = asked(planner, old, new, rows, found.exchange)
        layers = list(plan.new.layer_ids)
        assert (plan.old.physical_to_logical == old[layers]).all()
        assert (plan.new.physical_to_logical == new[layers]).all()
        fresh = asked(planner, old, new, layers, None)
        assert list(plan.transfers) == list(fresh.transfers) != list(found.exchange.transfers)
    twice = np.tile(np.arange(RANKS * SLOTS) % (2 * SLOTS) % EXPERTS, (LAYERS, 1))
    there = np.roll(twice, 1, axis=1)  # ranks 0 and 1 hold all, before and after
    weighed = asked(planner, twice, there, rows, None)
    assert asked(planner, twice, there, rows, weighed, live=[0, 1]).live_ranks == (0, 1)
    two_nodes = Planner(Topology(RANKS, (0, 1, 1)))
    assert asked(two_nodes, IN_FORCE, table, rows, found.exchange).topology.num_nodes == 2


def test_what_is_declined_leaves_nothing_to_carry_out():
    found = rebalance(min_gain=0.99)
    table = found.propose(load(), IN_FORCE, EngineRanks(RANKS))
    assert (table == IN_FORCE).all() and found.exchange is None
    assert found.decision.reason == "min_gain" and found.load is not None


def test_the_watchdog_is_told_whom_the_rebalance_waits_for():
    found = rebalance()
    found.waits_for("transfers", [1, 2])
    assert str(found.watchdog.waiting) == "transfers, layers 1..2, ranks [1, 2]"
    assert other_ranks(SimpleNamespace(world_size=4, rank_in_group=2)) == (0, 1, 3)


def test_layers_that_stay_are_left_out_where_they_are_most(decided):
    found, table = decided
    planner = Planner(Topology(RANKS))
    one = IN_FORCE.copy()
    row = int(np.flatnonzero((table != IN_FORCE).any(axis=1))[-1])
    one[row] = table[row]
    for weighed in (None, found.exchange):
        plan = asked(planner, IN_FORCE, one, list(range(LAYERS)), weighed)
        assert plan.new.layer_ids == (row,) and len(plan.transfers)


def test_bytes_of_other_layers_are_refused(decided):
    found, table = decided
    with pytest.raises(PlacementError, match="expert_bytes"):
        found.exchange.part(IN_FORCE, table, range(LAYERS), None, [1])
