"""Exchanges that cannot be finished: everybody learns why, nobody is left with a mixture."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.exchange.plan import plan_exchange
from moe_placement_plugin.exchange.transfer_table import TransferTable
from moe_placement_plugin.exchange.watchdog import WaitingFor, Watchdog
from moe_placement_plugin.rebalancing.lost_experts import place_lost

from .cases import random_placement
from .test_executor import check_weights


def a_plan(seed=0, ranks=3, layers=3, experts=8, slots=4, live=None):
    rng = np.random.default_rng(seed)
    return plan_exchange(
        random_placement(rng, layers, experts, [slots] * ranks),
        random_placement(rng, layers, experts, [slots] * ranks, live),
        live_ranks=live,
    )


def check_all(plan, results) -> None:
    first = results[plan.live_ranks[0]][1]
    for rank in plan.live_ranks:
        weights, done = results[rank][:2]
        assert (done == first).all()
        check_weights(weights, plan.new, rank, np.flatnonzero(done).tolist())
        check_weights(weights, plan.old, rank, np.flatnonzero(~done).tolist())


def test_ranks_with_different_plans_move_nothing(ranks):
    from .ranks import with_another_plan

    plan = a_plan()
    results = ranks.run(with_another_plan, 3, plan, plan_exchange(plan.old, a_plan(5).new))
    check_all(plan, results)
    assert not results[0][1].any()
    assert all("another plan" in result[2] for result in results)


def test_ranks_with_other_senders_between_the_same_tables_move_nothing(ranks):
    """The fault: a rank whose plan was made otherwise waits for what nobody sends."""
    from .ranks import with_another_plan

    old = Placement(np.array([[0, 1, 0, 1, 2, 3]] * 2), 4, (2, 2, 2))
    plan = plan_exchange(old, Placement(np.array([[0, 3, 0, 1, 2, 1]] * 2), 4, (2, 2, 2)))
    moves = plan.transfers.array.copy()
    of_1 = plan.transfers.expert == 1
    moves[of_1, 2] = 1 - moves[of_1, 2]  # both ranks hold it, in the same slot
    results = ranks.run(with_another_plan, 3, plan, replace(plan, transfers=TransferTable(moves)))
    check_all(plan, results)
    assert not results[0][1].any()
    assert all("another plan" in result[2] for result in results)


def test_a_reader_that_fails_on_one_rank_stops_all(ranks):
    from .ranks import with_a_failing_reader

    plan = a_plan(1, ranks=4, experts=9, live=[1, 2, 3])
    assert plan.reads.row.tolist().count(1) == 1
    results = ranks.run(with_a_failing_reader, 4, plan)
    check_all(plan, results)
    assert results[1][1].tolist() == [True, False, False]
    assert all("OSError: disk is gone, layer 1" in result[2] for result in results[1:])


def test_an_epoch_is_used_once(ranks):
    from .ranks import twice_with_one_epoch

    plan = a_plan()
    results = ranks.run(twice_with_one_epoch, 3, plan, plan_exchange(plan.new, plan.old))
    for rank, (weights, refused) in enumerate(results):
        check_weights(weights, plan.old, rank)
        assert "epoch 1 was used before" in refused


def test_the_watchdog_ends_the_wait_for_a_rank_that_hangs(ranks):
    from .ranks import with_a_rank_that_hangs

    plan = a_plan()
    results = ranks.run(with_a_rank_that_hangs, 3, plan, 1)
    check_all(plan, results)
    assert not results[0][1].any()
    assert any(
        re.search(r"ranks \[(0, |2, )?1\b", line) for rank in (0, 2) for line in results[rank][3]
    )
    for rank in (0, 2):
        reason, said, seconds = results[rank][2:]
        assert seconds < 20  # transfers alone would wait for forty
        waits = (
            r"not finished after \d+\.\d s; waiting for: receive, layer 0, round \d, "
            r"ranks \[.*\], [\d,]+ bytes"
        )
        assert any(re.search(waits, line) for line in said), (
            said
        )  # the first on a busy machine: for its start
        assert any("interrupting" in line for line in said)
        assert reason


def test_without_its_store_a_rank_stops(ranks):
    from .ranks import after_the_store_is_gone

    results = ranks.run(after_the_store_is_gone, 3, a_plan())
    assert results[0] is None
    assert all("stop this rank" in said for said in results[1:]), results


def test_survivors_go_on_without_the_dead(ranks):
    from .ranks import recovering

    plan = a_plan(ranks=4, layers=5, experts=10, slots=5)
    results = ranks.run(recovering, 4, plan, 2)
    assert results[2] is None
    weights, in_force, live, _ = results[0]
    assert live == (0, 1, 3)
    after = place_lost(in_force, live)
    lost = {
        (row, e)
        for row in range(5)
        for e in range(10)
        if not any(e in in_force.local_experts(row, r) for r in live)
    }
    asked = set()
    for rank in live:
        assert results[rank][1] == in_force
        check_weights(results[rank][0], after, rank)
        asked |= set(results[rank][3])
    assert asked == lost and lost


def test_place_lost_moves_nothing_else():
    rng = np.random.default_rng(1)
    old = random_placement(rng, 4, 10, [5] * 4)
    load = rng.integers(1, 100, (4, 10))
    new = place_lost(old, [0, 1, 3], load)
    plan = plan_exchange(old, new, live_ranks=[0, 1, 3])
    assert not len(plan.transfers) and not len(plan.copies)
    lost = [
        (row, e)
        for row in range(4)
        for e in range(10)
        if not any(e in old.local_experts(row, r) for r in (0, 1, 3))
    ]
    assert sorted((read.row, read.expert) for read in plan.reads) == lost and lost
    assert (new.physical_to_logical[:, 10:15] == old.physical_to_logical[:, 10:15]).all()
    with pytest.raises(PlacementError, match="5 slots for 10 experts"):
        place_lost(old, [0])
    with pytest.raises(PlacementError, match="shape"):
        place_lost(old, [0, 1, 3], load[:2])


def until(condition, seconds: float = 20) -> None:
    """Wait for something that happens soon on a machine that is not busy."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_watchdog_says_what_is_waited_for_and_then_is_quiet():
    said: list[str] = []
    watchdog = Watchdog(0.05, report=said.append)
    watchdog.waits_for(WaitingFor("receive", (3, 4), 2, (7, 1), 44_040_192))
    with watchdog:
        until(lambda: len(said) >= 2)
    count = len(said)
    assert all(
        "receive, layers 3..4, round 2, ranks [7, 1], 44,040,192 bytes" in line for line in said
    )
    time.sleep(0.15)
    assert len(said) == count and watchdog.expired is None


def test_the_watchdog_logs_by_itself_and_interrupts_once(caplog):
    interrupted = []
    watchdog = Watchdog(0.03, 0.08).watch(lambda: interrupted.append(1))
    watchdog.waits_for(WaitingFor("agree", (5,), None, (0, 1)))
    with caplog.at_level(logging.WARNING, "moe_placement_plugin"), watchdog:
        until(lambda: interrupted)
        time.sleep(0.1)
    assert interrupted == [1] and watchdog.expired == "agree, layer 5, ranks [0, 1]"
    assert "interrupting it; waiting for: agree, layer 5" in caplog.text


@pytest.mark.parametrize("arguments", [(0,), (5, 1), (1, 2, "shout")])
def test_a_watchdog_with_senseless_limits(arguments):
    with pytest.raises(PlacementError, match="watchdog"):
        Watchdog(*arguments)
