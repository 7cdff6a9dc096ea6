"""Test ``moe-placement bench exchange`` with real processes and small experts.

What the figures must add up to.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bench moves tensors")

from moe_placement_plugin import Placement, PlacementError  # noqa: E402
from moe_placement_plugin.cli.bench.exchange import bench_exchange  # noqa: E402
from moe_placement_plugin.lab.bench.exchange.drift import (  # noqa: E402
    drift_suite,
    drifting,
    received,
)
from moe_placement_plugin.lab.bench.exchange.ranks import Sizes, uniform_replicas  # noqa: E402
from moe_placement_plugin.lab.bench.exchange.run import RANKS, survivors_placements  # noqa: E402
from tests.support import forkserver  # noqa: E402

SIZES = Sizes(2, 16, 32, 32)


def bench(path: Path, **given) -> dict:
    forkserver.context()  # before the bench starts one that loads less
    usual = {
        "traces": None,
        "suite": ["dead"],
        "layers": 1,
        "hidden": 32,
        "width": 32,
        "sent": False,
        "folder": path.parent,
        "vllm_python": None,
        "repeats": 1,
        "json_path": path,
    }
    bench_exchange(**usual | given)
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [False, True], ids=["read", "sent"])
def test_dead_ranks_from_the_checkpoint_to_the_table(sent, tmp_path, capfd):
    """The bench itself compares the weights after each exchange with the checkpoint's."""
    most = 1 if sent else 2
    result = bench(tmp_path / "out.json", dead=most, replicas=[2], sent=sent)
    rows = {(row["replicas"], row["dead"], row["goal"]): row for row in result["dead"]}
    goals = [
        (2, 0, "all moved"),
        *((2, dead, goal) for dead in range(1, most + 1) for goal in ("recovered", "rebalanced")),
    ]
    assert list(rows) == goals and all(row["sees"] is not sent for row in rows.values())
    assert rows[2, 1, "recovered"]["from_disk"] == rows[2, 1, "rebalanced"]["from_disk"] == 0, (
        "the other replica is alive"
    )
    assert (
        rows[2, most, "recovered"]["from_peers"] == 0 and rows[2, 0, "all moved"]["slots"] == 2 * 64
    )
    for row in rows.values():
        assert (
            row["bytes_moved"] == row["from_peers"] * 3 * 32 * 32 * 2
            and row["bytes_read"] == row["from_disk"] * 3 * 32 * 32 * 2
        )
        for kind in ("cold", "cached"):
            times = row[kind]
            assert times["exchange"] > 0 and times["shorter"] == pytest.approx(
                times["reload all"] / times["exchange"]
            )
    shown = capfd.readouterr().out
    assert (
        "sent over gloo" if sent else "read in each other's memory"
    ) in shown and f"2 replicas, {most} dead" in shown


def test_replicas_of_the_made_up_placement_lie_on_different_ranks():
    for replicas in (1, 2, 3, 4):
        placement = uniform_replicas(SIZES, RANKS, replicas, np.random.default_rng(replicas))
        for row in placement.physical_to_logical.reshape(SIZES.layers, RANKS, -1):
            assert all(len(set(held)) == len(held) for held in row.tolist())
            assert (np.bincount(row.ravel(), minlength=SIZES.experts) == replicas).all()


def test_survivors_hold_every_expert():
    rng = np.random.default_rng(0)
    old, load = (
        uniform_replicas(SIZES, RANKS, 2, rng),
        rng.integers(1, 100, (SIZES.layers, SIZES.experts)),
    )
    live = [1, 2, 4, 7]
    slots = np.isin(old.rank_of_slot, live)
    for new in survivors_placements(old, load, live).values():
        assert isinstance(new, Placement)
        assert all(set(row[slots]) == set(range(SIZES.experts)) for row in new.physical_to_logical)


def test_drifting_loads_and_what_moves():
    traces = {
        name: np.random.default_rng(seed).integers(100, 1000, (3, 16))
        for seed, name in enumerate("ab")
    }
    loads = drifting(traces, windows=4)
    assert {label: load.shape for label, load in loads.items()} == {
        "a, drifting": (5, 3, 16),
        "from trace to trace (2)": (5, 3, 16),
    }
    assert received(np.array([[0, 1, 2, 3]]), np.array([[1, 0, 2, 2]]), 2) == 0, (
        "a rank that holds it already receives nothing"
    )
    assert received(np.array([[0, 1, 2, 3]]), np.array([[0, 2, 1, 3]]), 2) == 2
    rows = drift_suite(traces, None, lambda _: None, ranks=4, redundant=4)
    for row in rows:
        found = row["replan"]
        assert (
            0 < found["moved"] < 20 * row["slots"]
            and found["bytes"] == found["moved"] * row["expert_bytes"]
        )
        assert 0.5 < found["balancedness"] <= 1


def test_bad_arguments(tmp_path):
    with pytest.raises(PlacementError, match="--suite alive: choose from dead, drift"):
        bench(tmp_path / "out.json", suite=["alive"], dead=1, replicas=None)
    with pytest.raises(PlacementError, match="--suite drift needs recorded loads"):
        bench(tmp_path / "out.json", suite=["drift"], dead=1, replicas=None)
