"""Ranks of several hosts say what they will serve: all go on, or all stop with one message."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

pytest.importorskip("torch", reason="the hosts compare through torch's stores")

from moe_placement_plugin import Placement  # noqa: E402
from moe_placement_plugin.core.errors import PlacementError  # noqa: E402
from moe_placement_plugin.formats.packed import pack, unpack  # noqa: E402

from .stores import all_agree, connections, statement  # noqa: E402


def refused(results) -> str:
    """Return the message, which must be the same on all ranks."""
    assert all(isinstance(result, PlacementError) for result in results), results
    assert len({str(result) for result in results}) == 1
    return str(results[0])


def test_equal_hosts_agree_and_know_their_nodes():
    results = all_agree([statement(rank) for rank in range(6)])
    for agreed in results:
        assert agreed.node_of_rank == (0, 0, 1, 1, 2, 2)
        assert agreed.names() == (
            "node0 (10.0.0.1), ranks 0-1",
            "node1 (10.0.0.2), ranks 2-3",
            "node2 (10.0.0.3), ranks 4-5",
        )
    assert "3 hosts agree" in str(results[0])


def test_ranks_that_do_not_lie_in_order():
    results = all_agree([statement(rank, host=rank % 2) for rank in range(4)])
    assert (
        results[3].node_of_rank == (0, 1, 0, 1)
        and results[3].names()[1] == "node1 (10.0.0.2), ranks 1, 3"
    )


def test_a_stale_plan_on_one_host():
    results = all_agree(
        [statement(0), statement(1), statement(2, digest="0" * 64), statement(3, digest="0" * 64)]
    )
    message = refused(results)
    assert "node1 (10.0.0.2), ranks 2-3 has placement 000000000000 from /plans/plan.json" in message
    assert "the head has placement dddddddddddd" in message and "remove it there" in message
    assert message.count("node1") == 1  # its ranks say the same


DIFFERENCES = {
    "another plugin version": ({"plugin": "1.1"}, "plugin version 1.1, the head has 1.0"),
    "another engine version": (
        {"engine": "vLLM 0.33.0"},
        "engine vLLM 0.33.0, the head has vLLM 0.32.0",
    ),
    "another strategy": ({"strategy": "zigzag"}, "strategy zigzag, the head has eplb"),
    "another level of verification": (
        {"rules": {"--expert-placement-verify": "off"}},
        "--expert-placement-verify off, the head has None",
    ),
    "the engine's own placement": (
        {"digest": "", "source": ""},
        "the engine's own placement, the head has placement dddddddddddd",
    ),
    "a file that does not fit": (
        {"error": "plan.json is for 8 EP ranks"},
        "cannot have what was asked for: plan.json is for 8 EP ranks",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_host_that_differs(name):
    changes, expected = DIFFERENCES[name]
    message = refused(
        all_agree([statement(0), statement(1), statement(2, **changes), statement(3, **changes)])
    )
    assert (
        expected in message
        and "node1 (10.0.0.2), ranks 2-3" in message
        and "none of them starts" in message
    )


def test_several_differences_are_one_message():
    message = refused(
        all_agree(
            [
                statement(0),
                statement(2, plugin="2.0", strategy="zigzag"),
                statement(1, host=2, digest="0" * 64),
            ]
        )
    )
    assert "plugin version 2.0" in message and "strategy zigzag" in message and "node2" in message


def test_the_plugin_is_missing_on_one_host():
    """Whoever it is, and whether it holds the parcel."""
    for silent in (0, 3):
        speaking = [statement(rank) for rank in range(4) if rank != silent]
        message = refused(all_agree(speaking, wait=1, ranks=4))
        assert (
            f"no word within 1 s from the host of rank {silent}" in message
            and "not installed there" in message
        )


def test_a_host_without_the_file_takes_the_heads():
    plan = Placement(
        np.stack([np.random.default_rng(layer).permutation(16) for layer in range(3)]), 16, (8, 8)
    )
    parcel = {"plan": pack(plan)}
    results = all_agree(
        [statement(0, digest=plan.digest), statement(2, digest=None, source="/plans/plan.json")],
        {0: parcel, 2: {"plan": None}},
        ranks=3,
        wait=1,
    )
    assert "rank 1" in refused(results)  # nobody agrees without all
    results = all_agree(
        [statement(0, digest=plan.digest), statement(1, host=1, digest=None)],
        {0: parcel, 1: {"plan": None}},
    )
    assert unpack(results[1].parcel["plan"]).digest == plan.digest


def test_nobody_has_the_file():
    message = refused(all_agree([statement(0, digest=""), statement(1, host=1, digest=None)]))
    assert "the head has none either" in message


def test_the_store_is_gone():
    from torch.distributed import TCPStore

    from moe_placement_plugin.hosts.handshake import agree

    own = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", own.port, is_master=False, wait_for_workers=False)
    del own
    with pytest.raises(PlacementError, match="does not answer"):
        agree(client, statement(1), 2, None, wait=2)


def test_why_nobody_starts_is_said_although_the_store_is_gone_by_then(monkeypatch):
    """Rank 0 may end once all have said that they know: an answer may be lost with its store."""
    from moe_placement_plugin.hosts import handshake

    class Leaving:
        def __init__(self, store):
            self._store = store

        def __getattr__(self, name):
            return getattr(self._store, name)

        def add(self, *args):
            raise RuntimeError("Connection reset by peer")

    class Bounded(handshake.BoundedStore):
        def ask(self, call, limit=None):
            return super().ask(lambda store: call(Leaving(store)), limit)

    monkeypatch.setattr(handshake, "BoundedStore", Bounded)
    results = all_agree([statement(0), statement(1, host=1, plugin="1.1")])
    assert "plugin version 1.1, the head has 1.0" in refused(results)


def test_it_is_quick():
    """R1's plan on two hosts of eight ranks takes at most 100 ms once the last rank has come."""
    plan = Placement(
        np.stack(
            [np.resize(np.random.default_rng(layer).permutation(256), 288) for layer in range(58)]
        ),
        256,
        (18,) * 16,
    )
    parcel = {"plan": pack(plan)}
    seconds = []
    while len(seconds) < 5 or min(seconds) >= 0.1 and len(seconds) < 40:  # a busy machine
        statements = [
            statement(rank, host=rank // 8, digest=plan.digest if rank < 8 else None)
            for rank in range(16)
        ]
        results = all_agree(statements, dict.fromkeys(range(16), parcel))
        seconds.append(max(result.seconds for result in results))
    print(
        f"agreement of 16 ranks on 2 hosts: median {statistics.median(seconds) * 1000:.1f} ms, "
        f"longest {max(seconds) * 1000:.1f} ms"
    )
    assert min(seconds) < 0.1


def test_connections_are_independent():
    first, second = connections(2)
    first.set("key", "value")
    assert second.get("key") == b"value"
