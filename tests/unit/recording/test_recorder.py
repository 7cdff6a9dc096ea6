"""Files and failures of the recorder, with counters that are plain arrays."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.recording import recorder as load_recorder
from moe_placement_plugin.recording.recorder import (
    LoadRecorder,
    check_interval,
    check_path,
    part_path,
)
from moe_placement_plugin.recording.windows import MAX_WINDOWS, Windows
from tests.support.children import python_path


class Source:
    """Stand for counters, which the test moves."""

    def __init__(self, layers: int = 2, experts: int = 4, pairs: bool = False):
        self.counts = np.zeros((2, layers, experts), dtype=np.int64)
        self.pairs = np.zeros((layers, experts, experts), dtype=np.int64) if pairs else None

    def __call__(self):
        return self.counts.copy(), None if self.pairs is None else self.pairs.copy()


def recorder(path, source, layers=(0, 1), interval=60.0, **kwargs) -> LoadRecorder:
    return LoadRecorder(
        path, Windows(layers, 4, interval, {"model": "tiny"}), source, interval, **kwargs
    )


def test_counts_are_differences_and_phases_are_apart(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(load_recorder.time, "time", lambda: clock[0])
    path, source = tmp_path / "load", Source()
    r = recorder(path, source, interval=10)
    source.counts[0] += 5
    clock[0] = 1010
    r.flush()
    source.counts[0] += 1
    source.counts[1] += 2
    clock[0] = 1020
    r.flush()
    load = read_load(path)
    assert load.phases == ("prefill", "decode", "prefill")
    assert load.counts[:, 0, 0].tolist() == [5, 2, 1]
    assert (
        load.metadata["window_start"] == [1000, 1010, 1010]
        and load.metadata["window_seconds"] == 10
    )


def test_nothing_is_written_before_a_token_was_served(tmp_path):
    r = recorder(tmp_path / "load", Source())
    r.flush()
    r.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_file_is_bounded(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(load_recorder.time, "time", lambda: clock[0])
    path, source = tmp_path / "load", Source()
    r = recorder(path, source, interval=1)
    for _ in range(500):
        clock[0] += 1
        source.counts += 1
        r.flush()
    load = read_load(path)
    assert load.phases.count("decode") <= MAX_WINDOWS
    assert load.metadata["window_seconds"] == 8  # 500 s in at most 64 windows, by doubling
    assert (load.total == 1000).all()


def test_recording_goes_on_after_a_restart(tmp_path):
    path = tmp_path / "load"
    for _ in range(2):
        source = Source(pairs=True)
        r = recorder(path, source)
        source.counts += 3
        source.pairs += 1
        r.close()
    load = read_load(path)
    assert (load.total == 12).all() and (load.coactivation == 2).all()


def test_parts_of_other_processes_are_added(tmp_path):
    """Two data-parallel ranks of the same layers, and a pipeline stage with others."""
    path = tmp_path / "load"
    stale = part_path(path, 7)
    stale.write_bytes(b"of an earlier run")
    sources = [Source(), Source(), Source()]
    layers = [(0, 1), (0, 1), (2, 3)]
    recorders = [
        recorder(path, s, ids, part=k, num_parts=3)
        for k, (s, ids) in enumerate(zip(sources, layers))
    ]
    assert not stale.exists()
    for k, source in enumerate(sources):
        source.counts[1] += 10**k
    for r in recorders[::-1]:
        r.flush()
    load = read_load(path)
    assert load.layer_ids == (0, 1, 2, 3)
    assert load.total[:, 0].tolist() == [11, 11, 100, 100]
    # Parts are counted once, however often the first process writes.
    sources[0].counts[1] += 1
    recorders[0].flush()
    recorders[0].flush()
    assert read_load(path).total[:, 0].tolist() == [12, 12, 100, 100]


def test_first_process_idle(tmp_path):
    path = tmp_path / "load"
    sources = [Source(), Source()]
    recorders = [recorder(path, s, part=k, num_parts=2) for k, s in enumerate(sources)]
    sources[1].counts += 1
    recorders[1].flush()
    recorders[0].flush()
    assert (read_load(path).total == 2).all()


def test_full_disk_is_one_warning_and_nothing_is_lost(tmp_path, monkeypatch, caplog):
    path, source = tmp_path / "load", Source()
    r = recorder(path, source)
    full = [True]
    real = os.fsync

    def fsync(fd):
        if full[0]:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            source.counts += 1
            r.flush()
    warnings = [m for m in caplog.messages if "No space left" in m]
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert list(tmp_path.iterdir()) == [], "half-written files"
    full[0] = False
    r.flush()
    assert (read_load(path).total == 6).all()


def test_a_failing_device_does_not_end_the_thread(tmp_path, caplog):
    calls = threading.Event()

    def broken():
        calls.set()
        raise RuntimeError("device lost")

    r = recorder(tmp_path / "load", broken, interval=0.1)
    with caplog.at_level(logging.WARNING):
        r.served()
        assert calls.wait(20)
        time.sleep(0.3)
    assert r._thread.is_alive()
    r.close()
    assert sum("device lost" in m for m in caplog.messages) == 1


CRASHING = """
import sys, time, os, signal
import numpy as np
from tests.unit.recording.test_recorder import Source, recorder
source = Source()
r = recorder(sys.argv[1], source, interval=0.2)
r.served()
for _ in range(10):
    source.counts += 1
    time.sleep(0.1)
print("ready", flush=True)
source.counts += 1000000
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_crash_loses_at_most_the_running_window(tmp_path):
    path = tmp_path / "load"
    done = subprocess.run(
        [sys.executable, "-c", CRASHING, str(path)], capture_output=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    total = read_load(path).total
    # Ten steps of 2; one interval is two steps, and one more may fall between flush and kill.
    assert 2 * (10 - 3) <= total.min() and total.max() <= 20
    recorder(path, Source())  # the kill may have come within a write
    assert [p.name for p in tmp_path.iterdir()] == ["load"]


def test_what_was_half_written_goes_when_the_next_server_starts(tmp_path):
    own, part, kept = (
        tmp_path / ".load.k3_9abcd",
        tmp_path / ".load.part-1.k3_9abcd",
        [tmp_path / ".load.keep", tmp_path / ".loads.k3_9abcd"],
    )
    for file in (own, part, *kept):
        file.write_bytes(b"half")
    recorder(tmp_path / "load", Source(), part=1, num_parts=2)
    assert own.exists() and not part.exists()
    recorder(tmp_path / "load", Source(), num_parts=2)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def recorded(path) -> int:
    return int(read_load(path).total.min()) if path.exists() else 0


def wait_for(path, tokens: int) -> None:
    deadline = time.monotonic() + 30
    while recorded(path) < tokens and time.monotonic() < deadline:
        time.sleep(0.05)
    assert recorded(path) == tokens


@pytest.mark.slow
def test_an_idle_engine_has_written_everything(tmp_path):
    """What was counted waits neither for the window's end nor for other processes' parts.

    Servers kill their workers when they are stopped.
    """
    path, sources = tmp_path / "load", [Source(), Source()]
    recorders = [
        recorder(path, source, interval=10_000, part=k, num_parts=2)
        for k, source in enumerate(sources)
    ]
    for r in recorders:
        r.served()
    sources[0].counts += 2
    wait_for(path, 4)
    recorders[1].served()  # the first process has nothing of its own to write any more
    sources[1].counts += 3
    wait_for(path, 10)
    written = path.stat().st_mtime_ns
    time.sleep(2.5)
    assert path.stat().st_mtime_ns == written, "an idle engine goes on writing"
    for r in recorders:
        r._stop.set()


class Busy(Source):
    """Stand for counters whose last batch runs on while the first three looks are taken."""

    looks = 0

    def __call__(self):
        self.looks += 1
        self.counts += self.looks <= 3
        return super().__call__()


def test_a_batch_longer_than_the_wait_is_saved_to_its_end(tmp_path):
    path = tmp_path / "load"
    r = recorder(path, Busy(), interval=10_000)
    r.served()
    wait_for(path, 6)
    r._stop.set()


def test_what_is_written_within_a_window_belongs_to_it(tmp_path, monkeypatch):
    clock = [1012.0]
    monkeypatch.setattr(load_recorder.time, "time", lambda: clock[0])
    source = Source()
    r = recorder(tmp_path / "load", source, interval=10)
    source.counts[0] += 1
    r.flush(running=True)
    source.counts[0] += 2
    clock[0] = 1020
    r.flush()
    load = read_load(tmp_path / "load")
    assert load.metadata["window_start"] == [1010] and load.counts[0, 0, 0] == 3


ENDING = """
import sys, multiprocessing
from tests.unit.recording.test_recorder import Source, recorder

def child(path):
    source = Source()
    r = recorder(path, source, interval=1000)
    r.served()
    source.counts += 7

if __name__ == "__main__":
    p = multiprocessing.get_context(sys.argv[2]).Process(target=child, args=(sys.argv[1],))
    p.start(); p.join()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_ends_writes_its_last_window(tmp_path, method):
    path, script = tmp_path / "load", tmp_path / "ending.py"
    script.write_text(ENDING)
    subprocess.run(
        [sys.executable, script, path, method],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": python_path()},
    )
    assert (read_load(path).total == 14).all()


def test_check_path(tmp_path):
    check_path(tmp_path / "new")
    with pytest.raises(PlacementError, match="is a directory"):
        check_path(tmp_path)
    with pytest.raises(PlacementError, match="does not exist: make it"):
        check_path(tmp_path / "no" / "load")
    foreign = tmp_path / "foreign"
    foreign.write_text("precious")
    with pytest.raises(PlacementError, match="exists and is no recording"):
        check_path(foreign)
    source = Source()
    r = recorder(tmp_path / "load", source)
    source.counts += 1
    r.close()
    check_path(tmp_path / "load", (2, 4))
    with pytest.raises(PlacementError, match="another model"):
        check_path(tmp_path / "load", (2, 8))


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan", "inf", None])
def test_check_interval(value):
    with pytest.raises(PlacementError, match="--expert-load-interval"):
        check_interval(value)
    assert check_interval("2.5") == 2.5


def test_routing_that_is_not_seen_is_said_once(tmp_path, caplog):
    """Not at the first look, which may fall before the first layer of the first batch."""
    source = Source()
    r = recorder(tmp_path / "load", source)
    r.served()
    for count in range(4):
        r.flush()
        assert len(
            [record for record in caplog.records if "no routing is seen" in record.getMessage()]
        ) == (count > 0)
    source.counts += 1
    r.flush()
    r.close()
    assert len(caplog.records) == 1 and (read_load(tmp_path / "load").total == 2).all()
