"""Check predicted times of a step against values known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.simulation.costmodel import LayerCost
from moe_placement_plugin.simulation.step_time import dead_zone, step_time


def test_step_time_of_one_expert_per_rank_is_the_cost_of_the_hottest():
    placement = Placement(np.array([[0, 1]]), 2, (1, 1))
    cost = LayerCost(fixed=10, per_expert=5, per_token=1)
    time = step_time(placement, np.array([[1, 0]]), tokens=100, top_k=1, cost=cost)
    assert time.total_us == 10 + 5 + 100  # rank 0 gets all; expert 1 is never active
    assert time.ideal_us[0] == 10 + 2.5 + 50


@pytest.mark.parametrize("ranks", (1, 2, 4, 16))
def test_rows_follow_from_each_ranks_share(ranks):
    """A router with noise chooses six of 64 experts for each token, some of them often.

    A rank gets a token once, however many of its experts are chosen.
    """
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 0.7, 64) + rng.gumbel(size=(4000, 64))
    chosen = np.argsort(-scores, axis=1)[:, :6]
    owner = np.repeat(np.arange(ranks), 64 // ranks)
    most = max(int((owner[chosen] == rank).any(axis=1).sum()) for rank in range(ranks))
    counts, rows = np.bincount(chosen.ravel(), minlength=64)[None], LayerCost(0, 0, 0, per_row=1)
    placement = Placement(np.arange(64)[None], 64, (64 // ranks,) * ranks)
    assert step_time(placement, counts, 4000, 6, rows).total_us == pytest.approx(most, rel=0.02)
    assert step_time(placement, counts, 4000, 6, rows, all_gather=True).total_us == 4000


def test_replicas_take_tokens_in_turn():
    placement = Placement(np.array([[0, 0]]), 1, (1, 1))
    cost = LayerCost(0, 0, 1)
    assert step_time(placement, np.array([[7]]), tokens=101, top_k=1, cost=cost).total_us == 51


def test_more_tokens_on_few_experts_can_beat_balance():
    """The dead zone: with weights dominating, the placement with equal tokens is no faster."""
    counts = np.array([[90, 10, 10, 90, 0, 0, 0, 0]])
    balanced = Placement(np.array([[0, 1, 4, 5, 3, 2, 6, 7]]), 8, (4, 4))
    cost = LayerCost(fixed=0, per_expert=100, per_token=0.001)
    hot = Placement(np.array([[0, 3, 4, 5, 1, 2, 6, 7]]), 8, (4, 4))
    even, skew = (step_time(p, counts, 64, 2, cost).total_us for p in (balanced, hot))
    assert balanced.overall_balancedness(counts) > 1.5 * hot.overall_balancedness(counts)
    assert skew == pytest.approx(even, rel=0.01)


def test_dead_zone_formula():
    assert dead_zone(1) == 1.004 and dead_zone(32) == pytest.approx(1.724, abs=1e-3)
