"""Ranks that die in the middle: real processes, ended by SIGKILL at random points.

Whatever the moment, every survivor must hold, layer by layer, the old map or the new one as a
whole, the same layers on all survivors; or, when it stops with an error, the error must say so. 240
trials in all: 24 here, the others with the mark `engine`.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from moe_placement_plugin.exchange.plan import plan_exchange

from .cases import drifted, random_placement
from .test_executor import check_weights

WORLD = 5
LAYERS = 6


def make_plan(rng):
    old = random_placement(rng, LAYERS, 12, [4] * WORLD)
    new = (
        drifted(rng, old, share=0.4)
        if rng.random() < 0.5
        else random_placement(rng, LAYERS, 12, [4] * WORLD)
    )
    return plan_exchange(old, new)


def check_survivors(plan, results, victim: int | None) -> tuple[str, bool]:
    """Check what all survivors hold and say.

    Returns:
        (what became of the exchange: the number of layers on the new map, or ``complete``; whether
        a rank came too late to go on).
    """
    survivors = [rank for rank in range(WORLD) if results[rank] is not None]
    assert set(range(WORLD)) - set(survivors) <= {victim}
    # The store is in this process: on a machine that stands still for seconds it gives no answer in
    # time, and who asked must stop.
    stopped = {rank for rank in survivors if results[rank][1] is None}
    for rank in stopped:
        assert "stop this rank and load its weights anew" in results[rank][3]
    going_on = [rank for rank in survivors if rank not in stopped]
    if not going_on:
        return "lost", True
    committed, late = results[going_on[0]][1], stopped
    for rank in going_on:
        weights, done, live, reason = results[rank]
        assert (done == committed).all(), f"rank {rank} differs from rank {going_on[0]}"
        check_weights(weights, plan.new, rank, np.flatnonzero(done).tolist())
        check_weights(weights, plan.old, rank, np.flatnonzero(~done).tolist())
        if not done.all():
            told = "went on without" in reason or "stop this rank" in reason
            assert reason
            assert set(live) <= set(survivors) and (rank in live or told), (live, survivors, reason)
            late |= set(survivors) - set(live)
    return "complete" if committed.all() else f"{int(committed.sum())} layers", bool(late)


def trial(ranks, number: int) -> tuple[str, bool, bool]:
    """One exchange with a death.

    (what became of it, whether a rank came too late, whether the victim died in it).
    """
    from .ranks import exchange_with_a_death

    rng = np.random.default_rng([7, number])
    plan = make_plan(rng)
    victim = int(rng.integers(WORLD))
    limits = [{"max_layers": 1}, {"max_layers": 2, "batch_bytes": 1}, {}][
        number % 3
    ]  # one byte: a round is a batch
    nodes = [None, (0,) * WORLD, (0, 0, 0, 1, 1)][
        number // 3 % 3
    ]  # all is sent, all is read in the others' memory (mapped or not), some
    # Half of the victims are killed from outside at a random time, half kill themselves at a random
    # piece of work.
    share = float(rng.uniform())

    def kill(processes, store):
        if number % 2:
            return
        while store.add("ready", 0) < WORLD:
            time.sleep(0.001)
        time.sleep(share * store.add("microseconds", 0) / 1e6)
        with suppress(ProcessLookupError):  # it has finished already
            os.kill(processes[victim].pid, signal.SIGKILL)

    moment = share if number % 2 else None
    results = ranks.run(
        exchange_with_a_death,
        WORLD,
        plan,
        victim,
        moment,
        limits,
        nodes,
        number % 2 == number // 9 % 2,
        meanwhile=kill,
    )
    return *check_survivors(plan, results, victim), results[victim] is None


def run_trials(ranks, numbers) -> None:
    # A trial mostly waits for its survivors to find each other.
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda number: trial(ranks, number), numbers))
    died = sum(dead for *_, dead in outcomes)
    late = sum(late for _, late, _ in outcomes)
    kinds = {kind for kind, _, dead in outcomes if dead}
    print(
        f"{died} of {len(outcomes)} victims died in the exchange; {late} times a rank came too "
        f"late; {sorted(kinds)}"
    )
    # Deaths must be spread over the exchange: before its beginning or after its end they would
    # prove nothing.
    assert died >= 0.6 * len(outcomes)
    assert len(kinds) >= 3
    # Stopping in time is right, and stopping too often would be no survival: the time to notice is
    # short on a machine that suddenly gets busy only.
    assert late <= 0.25 * len(outcomes)


def test_nobody_dies(ranks):
    from .ranks import exchange_with_a_death

    plan = make_plan(np.random.default_rng(0))
    results = ranks.run(exchange_with_a_death, WORLD, plan, 0, None, {"max_layers": 1})
    assert check_survivors(plan, results, None) == ("complete", False)


@pytest.mark.slow
def test_a_death_at_random(ranks):
    run_trials(ranks, range(24))


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(24, 132, 36))
def test_more_deaths_at_random(ranks, first):
    run_trials(ranks, range(first, first + 36))
