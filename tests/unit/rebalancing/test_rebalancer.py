"""What is proposed to an engine.

Few moves, within the ranks that are alive, and what was lost first.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.load import ExpertLoad
from moe_placement_plugin.rebalancing.rebalancer import Proposal, Rebalancer, policy_from
from moe_placement_plugin.rebalancing.tables import EngineRanks
from moe_placement_plugin.simulation.costmodel import Calibration, Measurement
from tests.support.rebalance_rules import ANY_GAIN

LAYERS, EXPERTS, RANKS, SLOTS = 3, 12, 4, 6


def rebalancer(**rules) -> Rebalancer:
    policy = policy_from(ANY_GAIN | rules, "--flag")
    return Rebalancer(policy, range(LAYERS), 1000, logging.getLogger())


def in_force() -> np.ndarray:
    """Experts 0 to 11 twice.

    The last rank alone holds 11, once, and the third replica of 0 in its place.
    """
    row = np.concatenate([np.arange(12), np.arange(12)])
    row[11] = 0
    return np.tile(row, (LAYERS, 1))


def load() -> ExpertLoad:
    return ExpertLoad(
        np.random.default_rng(0).zipf(1.4, (2, LAYERS, EXPERTS)).clip(max=400),
        phases=("prefill", "decode"),
    )


def propose(planner: Rebalancer, old: np.ndarray, live_ranks=None) -> Proposal:
    return planner.propose(load(), old, EngineRanks(RANKS), live_ranks)


def on(table: np.ndarray, ranks) -> np.ndarray:
    return table[:, np.isin(np.arange(table.shape[1]) // SLOTS, ranks)]


def test_what_was_lost_comes_first_and_nothing_else_moves():
    planner = rebalancer(min_gain=0.9)  # which an ordinary rebalance would not reach
    old = in_force()
    table, decision, exchange = propose(planner, old, [0, 1, 2])
    assert decision.rebalance and decision.reason == "lost_experts"
    assert not len(exchange.transfers)
    assert [(read.row, read.expert) for read in exchange.reads] == [
        (row, 11) for row in range(LAYERS)
    ]
    assert (table != old).sum() == LAYERS and (on(table, [3]) == on(old, [3])).all()
    # Then, with all of them there, balance decides, and a dead rank is neither source nor goal.
    planner = rebalancer()
    after, decision, exchange = propose(planner, table, [0, 1, 2])
    assert decision.reason == "pays" and not len(exchange.reads) and len(exchange.transfers)
    assert not any(3 in (move.from_rank, move.to_rank) for move in exchange.transfers)
    assert (on(after, [3]) == on(table, [3])).all()
    for row in range(LAYERS):
        assert set(on(after, [0, 1, 2])[row]) == set(range(EXPERTS))


def test_too_few_slots_are_refused():
    with pytest.raises(PlacementError, match="6 slots for 12 experts"):
        propose(rebalancer(), in_force(), [1])


def test_more_staging_memory_than_is_allowed():
    planner = rebalancer(staging_bytes=1)
    table, decision, exchange = propose(planner, in_force())
    assert decision.reason == "staging" and (table == in_force()).all() and exchange is None


def test_with_a_calibration_the_gain_is_a_time(tmp_path):
    times = [
        Measurement(tokens=t, active_experts=e, microseconds=5.0 + 0.01 * t + 2.0 * e)
        for t in (10, 100, 1000, 5000)
        for e in (1, 4, 6)
    ]
    Calibration(device="a GPU", layer={}, measurements=times).write(tmp_path / "gpu.json")
    planner = rebalancer(calibration=str(tmp_path / "gpu.json"), top_k=2)
    decision = propose(planner, in_force()).decision
    assert decision.saved is not None and "saves" in str(decision)
    rows = [
        m.model_copy(update={"rows": r, "microseconds": m.microseconds + r})
        for m in times
        for r in (500, 1000)
    ]
    Calibration(device="a GPU", layer={}, measurements=rows).write(tmp_path / "gpu.json")
    gains = []
    for gathers in (False, True):
        planner = rebalancer(calibration=str(tmp_path / "gpu.json"), top_k=2)
        planner.all_gather = gathers
        gains.append(propose(planner, in_force()).decision.gain)
    assert gains[0] > gains[1] > 0, "what every rank does for all tokens no placement saves"
    with pytest.raises(PlacementError, match="--flag: calibration '/no/such' is neither a file"):
        policy_from({"calibration": "/no/such"}, "--flag")
