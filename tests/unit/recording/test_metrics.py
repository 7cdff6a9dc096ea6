"""Metrics: their values, and that a scrape never fails."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.recording.metrics import LoadCollector, contiguous

pytest.importorskip("prometheus_client", reason="comes with the engines")


def two_windows(path) -> ExpertLoad:
    counts = np.array([[[9, 9, 9, 9]], [[30, 10, 0, 0]], [[0, 0, 20, 20]]])
    metadata = {
        "window_start": [0, 60, 60],
        "window_seconds": 60,
        "events": {"rebalances": 2, "moved_bytes": 1e9},
    }
    load = ExpertLoad(counts, (3,), ("decode", "prefill", "decode"), metadata=metadata)
    write(load, path)
    return load


def samples(collector) -> dict:
    return {
        (s.name, *sorted(s.labels.values())): s.value
        for family in collector.collect()
        for s in family.samples
    }


def test_values_of_the_newest_window(tmp_path):
    path = tmp_path / "load"
    two_windows(path)
    found = samples(LoadCollector(path, lambda load: contiguous(load, 2)))
    assert (
        found["moe_expert_tokens_total", "prefill"] == 40
        and found["moe_expert_tokens_total", "decode"] == 76
    )
    # Newest window: 30 10 20 20, so 40 on either rank.
    assert (
        found["moe_expert_balancedness", "3"] == 1
        and found["moe_expert_balancedness_overall",] == 1
    )
    assert found["moe_expert_rank_load_ratio", "0"] == 1
    assert found["moe_expert_hottest_load_ratio", "0", "3"] == 1.5
    assert len([k for k in found if k[0] == "moe_expert_hottest_load_ratio"]) == 3
    assert (
        found["moe_placement_events_total", "rebalances"] == 2
        and found["moe_placement_events_total", "moved_bytes"] == 1e9
    )


def test_placement_in_force_counts(tmp_path):
    path = tmp_path / "load"
    two_windows(path)
    skewed = Placement(np.array([[0, 2, 1, 3]]), 4, (2, 2), (3,))
    assert samples(LoadCollector(path, lambda load: skewed))[
        "moe_expert_balancedness", "3"
    ] == pytest.approx(40 / 50)


def test_without_ranks_only_experts(tmp_path):
    path = tmp_path / "load"
    two_windows(path)
    names = {key[0] for key in samples(LoadCollector(path, lambda load: None))}
    assert "moe_expert_hottest_load_ratio" in names and not any(
        "rank" in n or "balancedness" in n for n in names
    )


def test_a_scrape_never_fails(tmp_path):
    path = tmp_path / "load"
    collector = LoadCollector(path, lambda load: None)
    assert samples(collector) == {}
    path.write_bytes(b"half")
    assert samples(collector) == {}
    two_windows(path)
    assert samples(collector)
    path.unlink()
    assert samples(collector) == {}


# Patches prometheus_client for the whole process, so in a process of its own.
INSTALL = """
import os, sys, tempfile
from moe_placement_plugin.recording import metrics
metrics.install(sys.argv[1], lambda load: None)
metrics.install(sys.argv[1], lambda load: None)
assert "prometheus_client" not in sys.modules, "imported before the engine said how values are kept"
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest, multiprocess
Counter("engines_own", "An engine's metric.").inc(3)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
assert b"engines_own_total 3.0" in generate_latest(registry)
for r in (registry, REGISTRY):
    assert generate_latest(r).count(b"\\nmoe_expert_tokens_total{") == 2, generate_latest(r)
"""


def test_install_reaches_both_kinds_of_registry(tmp_path):
    path = tmp_path / "load"
    two_windows(path)
    subprocess.run([sys.executable, "-c", INSTALL, str(path)], check=True, timeout=60)


def test_events_reach_the_recording(tmp_path, monkeypatch):
    from moe_placement_plugin.core import events

    from .test_recorder import Source, recorder

    monkeypatch.setattr(events, "_counts", {})
    source = Source()
    r = recorder(tmp_path / "load", source)
    events.count_event("rebalances")
    events.count_event("moved_bytes", 5)
    source.counts += 1
    r.close()
    assert read_load(tmp_path / "load").metadata["events"] == {
        "rebalances": 1,
        "moved_bytes": 5,
    }
