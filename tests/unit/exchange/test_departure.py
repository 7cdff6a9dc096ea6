"""The rank with the store ends as soon as it may, before another has read what was decided."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="agreements are kept in torch's stores")

from torch.distributed import TCPStore  # noqa: E402

from moe_placement_plugin.exchange import departure  # noqa: E402
from moe_placement_plugin.exchange.commit import Agreement  # noqa: E402
from moe_placement_plugin.exchange.plan import plan_exchange  # noqa: E402
from moe_placement_plugin.exchange.rank_stores import held_here  # noqa: E402
from tests.support import forkserver  # noqa: E402

from . import keepers  # noqa: E402
from .cases import random_placement  # noqa: E402
from .test_executor import check_weights  # noqa: E402


@contextmanager
def keeper(then, timeout: float = 20) -> Iterator[tuple]:
    """A process with the store and rank 0 of an agreement, which does ``then``.

    (the process, rank 1's agreement).
    """
    context = forkserver.context()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=keepers.hold, args=(there, then, timeout), daemon=True)
    process.start()
    there.close()
    try:
        store = TCPStore("127.0.0.1", here.recv(), is_master=False, wait_for_workers=False)
        yield process, Agreement(store, 1, 1, [0, 1], timeout)
    finally:
        process.kill()
        process.join()


def late(monkeypatch, name: str) -> None:
    """One of the agreement's readings comes late."""
    prompt = getattr(Agreement, name)

    def delayed(self, *args):
        time.sleep(keepers.LATE)
        return prompt(self, *args)

    monkeypatch.setattr(Agreement, name, delayed)


def ends(process, seconds: float = 20) -> float:
    """Seconds after which a process has ended."""
    began = time.monotonic()
    process.join(seconds)
    assert process.exitcode is not None, "it waits although all have read"
    return time.monotonic() - began


def test_a_committed_chunk_is_not_lost_with_the_store(monkeypatch):
    late(monkeypatch, "_await_fate")
    with keeper(keepers.after_a_commit) as (process, mine):
        assert mine.enter("digest") is None
        assert mine.vote(0, last=True) is None
        assert ends(process) < 10


def test_the_reason_of_an_abort_is_not_lost_with_the_store():
    with keeper(keepers.after_an_abort) as (process, mine):
        assert mine.enter("digest") is None
        time.sleep(keepers.LATE)
        assert mine.vote(0) == "the disk is gone"
        assert ends(process) < 10


def test_a_process_that_ends_in_the_middle_keeps_the_store_for_the_others():
    with keeper(keepers.after_an_error) as (process, mine):
        assert mine.enter("digest") is None
        assert mine.vote(0) is None
        time.sleep(keepers.LATE)
        assert mine.abort(1, "rank 0 does not send") == "rank 0 does not send"
        assert ends(process) < 10


def test_who_is_alive_is_not_lost_with_the_store(monkeypatch):
    late(monkeypatch, "_live")
    with keeper(keepers.after_the_survivors_are_known) as (process, mine):
        assert mine.enter("digest") is None
        assert mine.abort(0, "mine") in ("mine", "rank 2 has died")
        assert mine.survivors(20) == (0, 1)
        assert ends(process) < 10


@pytest.mark.parametrize("then", [keepers.after_a_commit, keepers.after_an_abort])
def test_a_reader_that_has_died_is_waited_for_only_so_long(then):
    with keeper(then, timeout=1.0) as (process, mine):
        assert mine.enter("digest") is None
        mine._ask(lambda s: mine._votes(0).add(s, 1))  # and never again
        assert 0.5 < ends(process) < 10


def test_who_waits_in_vain_says_for_whom(caplog):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = Agreement(store, 1, 0, [0, 1, 2], 0.2)
    other = Agreement(store, 1, 2, [0, 1, 2], 0.2)
    assert [mine.enter("digest"), other.enter("digest")] == [None, None]
    other._departure.leave()
    with caplog.at_level(logging.WARNING, "moe_placement_plugin"):
        mine.stay()
    assert (
        "ranks [1] have not said within 0.2 s that they know how the exchange ended" in caplog.text
    )
    other._departure.over()
    assert mine._departure not in departure._open


def test_an_interruption_ends_the_wait(monkeypatch):
    monkeypatch.setattr(departure, "SLICE", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mine = Agreement(store, 1, 0, [0, 1], 30, lambda: "the watchdog gave up")
    assert mine.enter("digest") is None
    began = time.monotonic()
    mine.stay()
    assert time.monotonic() - began < 10 and mine._departure not in departure._open


def test_what_is_kept_for_the_end_of_the_process_is_given_up_in_time():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = []
    for epoch in range(3):
        made.append(Agreement(store, epoch, 0, [0, 1], 0.0))
        assert made[-1].enter("digest") is None
        time.sleep(0.001)
    kept = [agreement._departure in departure._open for agreement in made]
    assert kept == [False, False, True], "of exchanges whose time has passed"
    made[-1]._departure.over()


def test_whose_store_it_is():
    own = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = TCPStore("127.0.0.1", own.port, is_master=False, wait_for_workers=False)
    wrapped = [
        torch.distributed.PrefixStore("a", torch.distributed.PrefixStore("b", s))
        for s in (own, other)
    ]
    assert [held_here(s) for s in (own, other, *wrapped)] == [True, False, True, False]
    assert not held_here(torch.distributed.HashStore())


def test_an_exchange_that_is_over_where_the_store_is_is_over_everywhere(ranks):
    """Real exchanges: the process with the store is killed as soon as its own has ended."""
    from .ranks import with_a_late_reader

    rng = np.random.default_rng(8)
    old = random_placement(rng, 3, 8, [4] * 3)
    plan = plan_exchange(old, random_placement(rng, 3, 8, [4] * 3))
    results = ranks.run(with_a_late_reader, 3, plan)
    for rank in range(3):
        assert not isinstance(results[rank], str), results[rank]
        check_weights(results[rank], plan.new, rank)
