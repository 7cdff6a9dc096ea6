"""Whether a rebalance pays: each rule by itself, on loads made for it."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.events import event_counts
from moe_placement_plugin.core.load import ExpertLoad
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.exchange.plan import plan_exchange
from moe_placement_plugin.rebalancing.decision import REASONS, announce, decide
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from moe_placement_plugin.simulation.costmodel import LayerCost

OLD = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, (2, 2))
NEW = Placement(np.array([[0, 2, 1, 3], [0, 1, 2, 3]]), 4, (2, 2))
PLAN = plan_exchange(OLD, NEW, expert_bytes=1_000_000)
HOT = [30, 30, 10, 10]
"""Tokens per expert.

60 and 20 on the ranks of OLD, 40 and 40 on those of NEW (in the first layer).
"""


def load(*windows, phases=()) -> ExpertLoad:
    return ExpertLoad(np.array([[w, [10, 10, 10, 10]] for w in windows]), phases=phases)


def test_a_gain_is_taken_and_told():
    found = decide(PLAN, load(HOT))
    assert found.rebalance and found.reason == "pays"
    assert found.gain == pytest.approx(1 - 60 / 80)
    assert (found.before, found.after) == (pytest.approx(60 / 80), pytest.approx(1))
    assert found.bytes == 2_000_000 and found.seconds == pytest.approx(1e6 / 25e9)
    line = str(found)
    assert (
        "\n" not in line
        and "accepted" in line
        and "+25.0%" in line
        and "0.7500 -> 1.0000" in line
        and "2.0 MB" in line
    )


@pytest.mark.parametrize(
    "reason, change, windows, phases, achieved",
    [
        ("min_gain", {"min_gain": 0.26}, [HOT], (), None),
        ("max_bytes", {"max_bytes": 1_999_999}, [HOT], (), None),
        ("max_pause", {"max_pause": 3.9e-5}, [HOT], (), None),
        ("staging", {"staging_bytes": 999_999}, [HOT], (), None),
        ("hysteresis", {"hysteresis": 0.1}, [HOT], (), 0.8),
        ("phase_loss", {}, [[300, 300, 100, 100], [30, 10, 30, 10]], ("prefill", "decode"), None),
        ("dead_zone", {"min_gain": 0.001}, [[1005, 1005, 995, 995]], ("decode",), None),
    ],
)
def test_each_refusal(reason, change, windows, phases, achieved):
    found = decide(
        PLAN, load(*windows, phases=phases), RebalancePolicy(**change), achieved=achieved
    )
    assert not found.rebalance and found.reason == reason
    assert "declined, " + REASONS[reason] in str(found)


def test_just_within_every_bound():
    policy = RebalancePolicy(
        min_gain=0.24,
        max_bytes=2_000_000,
        max_pause=4.1e-5,
        hysteresis=0.1,
        staging_bytes=1_000_000,
    )
    assert decide(PLAN, load(HOT), policy, achieved=0.851).rebalance


def test_the_dead_zone_is_only_that_of_small_decode_batches():
    mild = [1005, 1005, 995, 995]
    policy = {"min_gain": 0.001}
    assert (
        decide(PLAN, load(mild, phases=("decode",)), RebalancePolicy(**policy)).reason
        == "dead_zone"
    )
    assert (
        decide(
            PLAN, load(mild, phases=("decode",)), RebalancePolicy(small_batches=False, **policy)
        ).reason
        == "pays"
    )
    assert decide(PLAN, load(mild, phases=("prefill",)), RebalancePolicy(**policy)).reason == "pays"


def test_with_a_cost_model_gain_is_time_and_must_pay_back():
    by_tokens = LayerCost(0.0, 0.0, 1.0)
    by_experts = LayerCost(0.0, 50.0, 0.0)
    policy = RebalancePolicy(tokens_per_step={"mixed": 1000}, top_k=2)
    busy = load([3_000_000, 3_000_000, 1_000_000, 1_000_000])
    gained = decide(PLAN, busy, policy, by_tokens)
    assert gained.rebalance and 0.1 < gained.gain < 0.3 and gained.saved > gained.seconds
    assert "saves" in str(gained)
    # Every expert is active on either placement: where weights are all that counts nothing is
    # gained.
    assert decide(PLAN, busy, policy, by_experts).reason == "min_gain"
    slow = RebalancePolicy(tokens_per_step={"mixed": 1000}, top_k=2, bandwidth=1e5)
    assert decide(PLAN, busy, slow, by_tokens).reason == "payback"


def test_no_change_and_lost_experts():
    assert decide(plan_exchange(OLD, OLD), load(HOT)).reason == "unchanged"
    three = Placement(np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 2, 3]]), 4, (2, 2, 2))
    moved = Placement(np.array([[0, 1, 2, 3, 2, 3], [0, 1, 2, 3, 2, 3]]), 4, (2, 2, 2))
    found = decide(plan_exchange(three, moved, live_ranks=[0, 2]), load(HOT))
    assert found.rebalance and found.reason == "lost_experts"
    # Rank 1 is dead but all it held lies elsewhere: balance decides, among the live ranks.
    held = Placement(np.array([[0, 1, 0, 1, 2, 3]] * 2), 4, (2, 2, 2))
    swapped = Placement(np.array([[0, 2, 0, 1, 1, 3]] * 2), 4, (2, 2, 2))
    found = decide(plan_exchange(held, swapped, live_ranks=[0, 2]), load(HOT))
    assert found.reason == "pays" and found.before == pytest.approx(60 / 80)


def test_chunks_bound_the_pause():
    both = plan_exchange(
        OLD, Placement(np.array([[0, 2, 1, 3]] * 2), 4, (2, 2)), expert_bytes=1_000_000
    )
    whole, cut = (decide(both, load(HOT), chunks=both.chunks(max_layers=n)) for n in (None, 1))
    assert (whole.chunks, cut.chunks) == (1, 2)
    assert cut.pause == pytest.approx(whole.pause / 2) and cut.seconds == pytest.approx(
        whole.seconds
    )


def test_decisions_are_logged_and_counted(caplog):
    counted = {}
    with caplog.at_level(logging.INFO, "moe_placement_plugin"):
        announce(
            decide(PLAN, load(HOT), RebalancePolicy(min_gain=0.5)),
            lambda event, amount: counted.update({event: amount}),
        )
    assert counted == {"rebalance_declined": 1, "rebalance_declined_min_gain": 1}
    assert len(caplog.records) == 1 and "below the minimum" in caplog.text


def test_they_reach_the_recording():
    before = event_counts().get("rebalance_accepted_pays", 0)
    announce(decide(PLAN, load(HOT)))
    assert event_counts()["rebalance_accepted_pays"] == before + 1


@pytest.mark.parametrize(
    "change", [{"min_gain": -1}, {"hysteresis": 1.5}, {"bandwidth": 0}, {"max_bytes": -5}]
)
def test_senseless_policies(change):
    with pytest.raises(PlacementError, match=next(iter(change))):
        RebalancePolicy(**change)


def test_a_load_of_another_model():
    with pytest.raises(PlacementError, match="different models"):
        decide(PLAN, ExpertLoad(np.ones((1, 2, 5), np.int64)))
