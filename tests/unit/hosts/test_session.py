"""A worker's session with the other hosts ends when its process does."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("torch", reason="hosts show that they live through torch's stores")

import torch.distributed as dist  # noqa: E402

from moe_placement_plugin.hosts import session  # noqa: E402
from moe_placement_plugin.hosts.handshake import Agreement  # noqa: E402

from .stores import connections, statement  # noqa: E402


@pytest.fixture
def at_the_end(monkeypatch) -> list:
    """Open a session of rank 0 of two hosts; return what its process is to call at its end."""
    (store,) = connections(1)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    both = Agreement((statement(0, host=0), statement(1, host=1)), None, seconds=0.0)
    monkeypatch.setattr(session, "agree", lambda *_: both)
    calls: list = []
    monkeypatch.setattr(
        session.util, "Finalize", lambda _, call, exitpriority: calls.append((exitpriority, call))
    )
    facts = {"engine": "none", "strategy": "eplb", "digest": ""}
    log = logging.getLogger("hosts-test")
    assert session.open_session(facts, None, 60.0, log, "rank {}".format) is both
    return calls


def test_a_process_that_ends_watches_no_longer_and_forgets(at_the_end):
    watch = session._session.watch
    assert session.agreed() is not None and not watch._stop.is_set()
    ((priority, call),) = at_the_end
    assert priority == 0, "what others do at the end comes first"
    call()
    assert watch._stop.is_set()
    assert session.agreed() is None and session.topology([0, 1]) is None
    call()  # a second session of the process has registered it again
