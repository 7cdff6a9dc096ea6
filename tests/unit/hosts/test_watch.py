"""Hosts that vanish are noticed within the stated time, hosts that live are left alone."""

from __future__ import annotations

import threading
import time

import pytest

pytest.importorskip("torch", reason="hosts show that they live through torch's stores")

from moe_placement_plugin.core.errors import PlacementError  # noqa: E402
from moe_placement_plugin.hosts.bounded_store import BoundedStore, StoreSilent  # noqa: E402
from moe_placement_plugin.hosts.identity import (  # noqa: E402
    address_towards,
    address_towards_store,
    host_key,
    innermost_store,
    number_hosts,
    ranges,
)
from moe_placement_plugin.hosts.watch import HostWatch, JoinWatch, check_timeout  # noqa: E402

from .stores import connections  # noqa: E402


def until(condition, seconds: float = 20) -> None:
    """Wait for something that happens soon on a machine that is not busy."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


NAMES = ("node0 (10.0.0.1), rank 0", "node1 (10.0.0.2), rank 1", "node2 (10.0.0.3), rank 2")


def watches(timeout: float):
    """Make a watch for each host; return them and what each of them says."""
    said: list[list[tuple[float, str]]] = [[] for _ in NAMES]
    stores = connections(len(NAMES))
    found = [
        HostWatch(
            store,
            host,
            NAMES,
            timeout=timeout,
            end=lambda reason, host=host: said[host].append((time.monotonic(), reason)),
        )
        for host, store in enumerate(stores)
    ]
    return found, said


def test_a_host_that_falls_silent_is_named_by_all_others():
    found, said = watches(timeout=1.0)
    for watch in found:
        watch.start()
    time.sleep(1.6)
    assert said == [[], [], []], "hosts that live were blamed"
    found[1].stop()
    gone = time.monotonic()
    until(lambda: said[0] and said[2])
    for host in (0, 2):
        ((when, reason),) = said[host]
        assert (
            "host node1 (10.0.0.2), rank 1 gave no sign of life for 1 s" in reason
            and "node0" not in reason
        )
        # A tenth of the timeout a count; the clock of a busy machine says less.
        assert found[host]._silent[1] == 11 and when - gone < 15
    found[0].stop(), found[2].stop()


def test_a_host_that_never_begins():
    found, said = watches(timeout=0.6)
    found[0].start(), found[1].start()
    until(lambda: said[0] and said[1])
    assert all("node2" in said[host][0][1] for host in (0, 1))


class Hanging:
    """Stand for a store at the other end of a dead link."""

    def __init__(self):
        self.over = threading.Event()
        self.asked = 0

    def __getattr__(self, name):
        def hang(*args, **kwargs):
            self.asked += 1
            return self.over.wait(20)

        return hang


def test_a_store_that_does_not_answer():
    found, said = watches(timeout=0.6)
    hanging = Hanging()
    found[1]._store = hanging
    found[1].start()
    until(lambda: said[1])
    hanging.over.set()
    assert said[1] and "host node0 (10.0.0.1), rank 0 gave no sign of life" in said[1][0][1]


def test_questions_to_a_silent_store_end():
    hanging = Hanging()
    store = BoundedStore(hanging, 0.2)
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(StoreSilent, match="no answer within 0.2 s"):
            store.ask(lambda s: s.get("key"))
        store._limit = 60
    assert time.monotonic() - began < 15, "later questions must not wait again"
    assert hanging.asked == 1


def test_questions_keep_their_errors_and_answers():
    (connection,) = connections(1)
    store = BoundedStore(connection, 10)
    store.ask(lambda s: s.set("a", "1"))
    assert store.ask(lambda s: s.get("a")) == b"1"
    with pytest.raises(ZeroDivisionError):
        store.ask(lambda s: 1 / 0)


def test_a_host_that_does_not_join(monkeypatch):
    monkeypatch.setattr(JoinWatch, "every", 0.1)
    ended, reports = [], []
    with JoinWatch("the other hosts to join at node0:29500", 0.7, ended.append, reports.append):
        until(lambda: ended)
    assert (
        2 <= len(reports) <= 6
        and "still waiting for the other hosts to join at node0:29500" in reports[0]
    )
    assert len(ended) == 1 and "waited 0.7 s" in ended[0] and "invalid choice" in ended[0]


def test_hosts_that_join():
    ended = []
    with JoinWatch("the others", 0.3, ended.append, ended.append):
        pass
    time.sleep(0.5)
    assert not ended


@pytest.mark.parametrize("value", ["soon", None, 0, -1, 1.9, float("nan"), float("inf")])
def test_timeouts_that_make_no_sense(value):
    with pytest.raises(PlacementError, match="--expert-host-timeout"):
        check_timeout(value)


def test_who_shares_a_host(monkeypatch):
    here = host_key()
    assert here == host_key()
    monkeypatch.setattr("socket.gethostname", lambda: "another-name")
    assert host_key() != here
    monkeypatch.setenv("NCCL_HOSTID", "rack 1")
    assert host_key() == "rack 1"
    assert number_hosts(["b", "a", "b", "c"]) == (0, 1, 0, 2)
    assert ranges([5, 0, 1, 2]) == "0-2, 5"
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no such host.invalid") == ""


def test_the_way_to_the_store_is_found_through_prefixes(tmp_path):
    from torch.distributed import FileStore, PrefixStore

    (connection,) = connections(1)
    wrapped = PrefixStore("more", connection)
    assert innermost_store(wrapped).host == "127.0.0.1"
    assert address_towards_store(wrapped) == "127.0.0.1"
    assert address_towards_store(FileStore(str(tmp_path / "store"), 1)) == "127.0.0.1"
