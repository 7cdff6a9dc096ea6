"""Test servers and runs that share a host: starts, ports, whose turn it is to measure."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.lab.gpu.serving import together
from moe_placement_plugin.lab.gpu.serving.ports import APART, BEHIND, CONNECTIONS, ports
from moe_placement_plugin.lab.gpu.serving.quiet import Quiet

from .stand_ins import Stub


def test_servers_that_start_end_with_the_run(tmp_path):
    """They would else be waited for until their time limit."""
    ended = threading.Event()

    class Starting(Stub):
        def __enter__(self):
            assert ended.wait(30), "it is stopped while it starts"
            raise PlacementError("the server ended with code -2 before it was ready:")

        def stop(self):
            ended.set()

    class Interrupted(Stub):
        def __enter__(self):
            raise KeyboardInterrupt

    servers = {
        "linear": Interrupted("linear", tmp_path / "linear"),
        "eplb": Starting("eplb", tmp_path / "eplb"),
    }
    with pytest.raises(KeyboardInterrupt):
        together.start(servers, 2, print, print)
    assert ended.is_set() and servers["linear"].stopped


def test_servers_ports_are_no_connections_and_leave_room_for_what_an_engine_derives(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.ports.random.randrange", lambda rows: rows // 2
    )
    given = ports()
    first = next(given)
    with socket.socket() as taken:
        taken.bind(
            ("127.0.0.1", first + APART + BEHIND + 4)
        )  # what SGLang would take its requests on
        taken.listen()
        others = [next(given) for _ in range(12)]
    found = sorted([first, *others])
    assert (
        max(found) + BEHIND + APART <= int(CONNECTIONS.read_text().split()[0])
        and first + APART not in found
    )
    assert (
        all((b - a) % APART == 0 and b > a for a, b in pairwise(found))
        and 0 < BEHIND % APART < APART - 6
    ), "derived ports lie between"
    # A machine that tells no such range, then one that gives connections all ports there are.
    monkeypatch.setattr(
        "moe_placement_plugin.lab.gpu.serving.ports.CONNECTIONS", tmp_path / "range"
    )
    assert next(ports()) > 0
    (tmp_path / "range").write_text("1024\t65535\n")
    assert next(ports()) > 0


def test_runs_that_share_a_host_measure_one_at_a_time_and_start_together(tmp_path):
    """A run that has measured lets the one that waits go first.

    It starts its next servers when that has measured too.
    """
    order, file = [], tmp_path / "quiet"
    both_started = threading.Barrier(2, timeout=20)

    def run(name):
        quiet = Quiet(file)
        for _ in range(2):
            both_started.wait()  # never passed if a start waited for the other's start
            order.append("start")
            both_started.wait()
            with quiet.measuring():
                order.append(f"begin {name}")
                time.sleep(0.2)
                order.append(f"end {name}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, "ab"))
    for at in (2, 8):
        begun = [word.split()[1] for word in order[at : at + 4 : 2]]
        assert sorted(begun) == ["a", "b"], order
        assert order[at : at + 4] == [
            f"{what} {name}" for name in begun for what in ("begin", "end")
        ], order
