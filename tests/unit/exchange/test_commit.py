"""The agreement by itself: more ranks than one counter holds, and who speaks first."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="agreements are kept in torch's stores")

from torch.distributed import PrefixStore, TCPStore  # noqa: E402

from moe_placement_plugin.core.errors import PlacementError  # noqa: E402
from moe_placement_plugin.exchange.commit import Agreement, ExchangeLost  # noqa: E402
from moe_placement_plugin.exchange.roll import RANKS_PER_WORD  # noqa: E402

RANKS = [0, RANKS_PER_WORD - 1, RANKS_PER_WORD, RANKS_PER_WORD + 1, 2 * RANKS_PER_WORD + 10]
"""Ranks whose votes lie in three counters."""

_server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
_runs = itertools.count()


def members(timeout: float = 20, ranks=RANKS) -> list[Agreement]:
    """One for each rank, each with its own connection."""
    name = f"run-{next(_runs)}"
    stores = [
        PrefixStore(
            name, TCPStore("127.0.0.1", _server.port, is_master=False, wait_for_workers=False)
        )
        for _ in ranks
    ]
    return [Agreement(store, 1, rank, ranks, timeout) for store, rank in zip(stores, ranks)]


def all_at_once(agreements, call):
    with ThreadPoolExecutor(len(agreements)) as pool:
        return list(pool.map(call, agreements))


def test_all_vote():
    agreements = members()
    assert all_at_once(agreements, lambda a: a.enter("digest")) == [None] * len(RANKS)
    for chunk in range(3):
        assert all_at_once(agreements, lambda a, chunk=chunk: a.vote(chunk)) == [None] * len(RANKS)
    agreements[0].forget(2)
    assert agreements[0].missing(1) == RANKS and agreements[0].missing(2) == []


def test_one_is_missing():
    """Whichever counter it would vote in."""
    for silent in (0, len(RANKS) - 1):
        agreements = members(timeout=30)
        speaking = [a for k, a in enumerate(agreements) if k != silent]
        impatient = speaking[1]
        impatient._timeout = 0.2

        def vote(agreement, impatient=impatient):
            while agreement is impatient and len(agreement.missing(0)) > 2:
                time.sleep(0.001)
            return agreement.vote(0)

        reasons = all_at_once(speaking, vote)
        assert len(set(reasons)) == 1 and f"for ranks [{RANKS[silent]}]" in reasons[0]
        # It comes too late, and learns it.
        assert agreements[silent].vote(0) == reasons[0]


def test_a_refusal_ends_the_wait_of_the_others():
    agreements = members(timeout=30, ranks=[0, 1, 2])
    threading.Timer(0.1, lambda: agreements[2].abort(0, "the disk is gone")).start()
    begin = time.monotonic()
    assert all_at_once(agreements[:2], lambda a: a.vote(0)) == ["the disk is gone"] * 2
    assert time.monotonic() - begin < 15


def test_what_is_decided_stays_decided():
    agreements = members(ranks=[0, 1])
    assert agreements[1].abort(0, "first") == "first"
    assert agreements[0].abort(0, "second") == "first"
    assert agreements[0].vote(0) == "first"


def test_who_is_alive():
    agreements = members(ranks=[0, 1, 2, 3])

    def ask(agreement):
        if agreement is agreements[1]:
            return agreement.survivors(30)
        while not agreement._ask(agreement._alive.present):
            time.sleep(0.001)
        return agreement.survivors(0.05)

    assert all_at_once(agreements[:2], ask) == [(0, 1)] * 2
    with pytest.raises(ExchangeLost, match=r"ranks \[0, 1\] went on without rank 2"):
        agreements[2].survivors(0.2)
    agreements = members(ranks=[0, 1, 2, 3])
    begin = time.monotonic()
    assert all_at_once(agreements, lambda a: a.survivors(30)) == [(0, 1, 2, 3)] * 4
    assert time.monotonic() - begin < 10


def test_plans_and_epochs():
    agreements = members(ranks=[0, 1])
    assert agreements[0].enter("one") is None
    assert "rank 1 has another plan" in agreements[1].enter("two")
    with pytest.raises(PlacementError, match="epoch 1 was used before"):
        agreements[0].enter("one")


def test_meeting():
    agreements = members()
    assert all_at_once(agreements, lambda a: a.meet("digest")) == [None] * len(RANKS)
    with pytest.raises(PlacementError, match="epoch 1 was used before"):
        agreements[0].meet("digest")
    # One whose plan differs must keep the others from reading weights that it is about to overwrite
    # otherwise.
    agreements = members(ranks=[0, 1, 2], timeout=30.0)
    agreements[0].enter("one")
    found = all_at_once(agreements[1:], lambda a: a.meet("one" if a is agreements[1] else "two"))
    assert all("rank 2 has another plan" in reason for reason in found), found
    agreements = members(ranks=[0, 1], timeout=0.3)
    assert "waited 0.3 s for ranks [1]" in agreements[0].meet("one")
