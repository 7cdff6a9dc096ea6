"""Test ``moe-placement bench layer`` and the staged benchmark, on CPU.

They test that they measure what they say, not how fast.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moe_placement_plugin import ExpertLoad, PlacementError
from moe_placement_plugin.cli.bench.layer import bench_layer as bench_command
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.bench.layer import run as layer_run
from moe_placement_plugin.lab.bench.layer.run import LayerBench, fitted, plan_all
from moe_placement_plugin.lab.bench.layer.shapes import (
    SHAPES,
    draw_step,
    find_shape,
    read_recordings,
    synthetic_load,
)
from moe_placement_plugin.lab.bench.timing import in_turn
from moe_placement_plugin.lab.staged_layer import find_matmuls
from moe_placement_plugin.simulation.costmodel import Calibration, fit

from ....support.children import python, run_child

CLI = (
    "-c",
    "from moe_placement_plugin.cli import main; main()",
    "bench",
    "layer",
    "--device",
    "cpu",
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_draw_step(skew):
    share = synthetic_load(SHAPES["tiny"], skew).counts[0, 0].astype(float)
    drawn = draw_step(share, 500, 4, np.random.default_rng(0))
    assert drawn.shape == (500, 4)
    assert all(len(set(token)) == 4 for token in drawn.tolist())
    counts = np.bincount(drawn.ravel(), minlength=16)
    wanted = np.minimum(2000 * share / share.sum(), 500)
    if skew <= 1:  # no expert is wanted by more tokens than there are
        assert (np.abs(counts - wanted) <= 5 * np.sqrt(wanted)).all()
    else:
        assert counts[share.argmax()] == 500


def test_draw_step_refuses_too_few_experts():
    with pytest.raises(PlacementError, match="3 experts were chosen, for top-4"):
        draw_step(np.array([1.0, 2, 3, 0, 0]), 10, 4, np.random.default_rng(0))


def test_times_follow_a_known_law(monkeypatch):
    """With a clock that obeys the cost model, the fit gives the law back.

    A layer lasts as long as its slowest rank.
    """
    shape = SHAPES["tiny"]
    bench = LayerBench("tiny", shape, CPU, find_matmuls("torch"), 3, use_ring=False)

    def runner(x, output):
        sizes = output.group_sizes
        microseconds = 20.0 + 5.0 * int((sizes > 0).sum()) + 0.25 * int(sizes.sum())
        return lambda: microseconds

    monkeypatch.setattr(bench, "_share_runner", runner)
    monkeypatch.setattr(bench._watch, "prepare", lambda function: function)
    load = synthetic_load(shape, 1.0)
    outcomes = []
    for ranks in (2, 3, 4):
        plans = plan_all(["linear", "eplb+4"], load, ranks, 1)
        outcomes += bench.measure(plans, load, [0, 2], "decode", 16, lambda _: None)
        outcomes += bench.measure(plans, load, [0, 2], "decode", 400, lambda _: None)
    assert len(outcomes) == 12
    for outcome in outcomes:
        assert list(outcome.layers) == [0, 2]
        for times in outcome.layers.values():
            assert len(times) == outcome.ranks
            assert (
                sum(t.tokens for t in times)
                == outcome.tokens_per_rank * outcome.ranks * shape.top_k
            )
            assert all(t.active <= t.slots for t in times)
        assert outcome.microseconds == sum(
            max(20 + 5 * t.active + 0.25 * t.tokens for t in times)
            for times in outcome.layers.values()
        )
    linear, eplb = outcomes[2], outcomes[3]
    assert (
        eplb.balancedness > 0.95 > linear.balancedness and eplb.microseconds < linear.microseconds
    )
    calibration = bench.calibration("decode", {"device": "a law"}, "command")
    cost = fitted(calibration)
    assert (cost.fixed, cost.per_expert, cost.per_token) == pytest.approx((20.0, 5.0, 0.25))
    assert cost.held_out == len(calibration.measurements) // 4 and cost.worst_error < 1e-6


def test_every_contestant_once_a_round_in_alternating_order():
    order = []
    times = in_turn({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)
    assert order == list("abccbaabc") and times["a"].tolist() == [1, 6, 7]


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(layer_run, "free_memory", lambda device: 1 << 20)
    bench = LayerBench("tiny", SHAPES["tiny"], CPU, find_matmuls("torch"), 1, use_ring=False)
    load = synthetic_load(SHAPES["tiny"], 0.7)
    with pytest.raises(
        PlacementError,
        match=r"tiny at EP 2 needs .* for 8 experts and .* rows, 0.0 GiB are free on cpu: measure "
        r"more ranks",
    ):
        bench.measure(plan_all(["linear"], load, 2, 1), load, [0], "prefill", 512, lambda _: None)


def test_bad_input(tmp_path):
    path = tmp_path / "load.safetensors"
    write(ExpertLoad(np.ones((1, 2, 8), dtype=np.int64)), path)
    (tmp_path / "no.npz").write_bytes(b"no")
    for says, call in {
        "choose from r1, v2-lite": lambda: find_shape("r2"),
        "has 8 experts, tiny has 16": lambda: read_recordings([path], SHAPES["tiny"], "tiny"),
        "no token-level trace": lambda: read_recordings(
            [tmp_path / "no.npz"], SHAPES["tiny"], "tiny"
        ),
        "after the plus": lambda: plan_all(
            ["eplb+many"], synthetic_load(SHAPES["tiny"], 1.0), 2, 1
        ),
    }.items():
        with pytest.raises(PlacementError, match=says):
            call()


def test_token_traces_are_counted(tmp_path):
    ids = np.random.default_rng(0).integers(0, 16, (3, 50, 4), dtype=np.uint8)
    np.savez(tmp_path / "t.npz", topk_ids=ids)
    load = read_recordings([tmp_path / "t.npz"], SHAPES["tiny"], "tiny")
    assert (load.counts[0, 2] == np.bincount(ids[2].ravel(), minlength=16)).all()


@pytest.mark.slow
def test_command(tmp_path):
    load = tmp_path / "load.safetensors"
    write(synthetic_load(SHAPES["tiny"], 1.0), load)
    options = [
        "--shape",
        "tiny",
        "--load",
        load,
        "--ep",
        2,
        "--ep",
        3,
        "--prefill",
        24,
        "--decode",
        4,
        "--layers",
        2,
        "--repeats",
        2,
    ]
    done = run_child(
        python(
            *CLI,
            *map(str, options),
            "--calibrations",
            str(tmp_path),
            "--json",
            str(tmp_path / "out.json"),
        ),
        120,
        {"OMP_NUM_THREADS": "1"},
    )
    assert done.code == 0, done.output
    assert (
        "kernel torch" in done.output and "EP 3, decode, 4 tokens per rank, 2 layers" in done.output
    )
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert [o["strategy"] for o in outcomes[:4]] == [
        "linear",
        "balanced",
        "zigzag",
        "eplb",
    ] and len(outcomes) == 16
    for outcome in outcomes:
        layers = outcome["layers"].values()
        assert (
            outcome["microseconds"]
            == pytest.approx(sum(max(r["microseconds"] for r in layer) for layer in layers))
            != 0
        )
    for phase in ("prefill", "decode"):
        calibration = Calibration.read(tmp_path / f"tiny-{phase}.json")
        assert calibration.layer["hidden_size"] == 128 and calibration.layer["kernel"].startswith(
            "torch"
        )
        assert fit(calibration.measurements).held_out >= 8


def test_command_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(PlacementError, match="finds no GPU here; leave --device out"):
        bench_command(shape="tiny", device="cuda")


@pytest.mark.slow
def test_staged_benchmark_runs(tmp_path):
    """Two gloo ranks: check, overhead and overlap to the end, with its own check passed."""
    command = python(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "moe_placement_plugin.lab.gpu.staged_layer",
        "check",
        "overhead",
        "overlap",
    )
    done = run_child(
        [
            *command,
            "--device",
            "cpu",
            "--rounds",
            "2",
            "--chunks",
            "2",
            "--json",
            str(tmp_path / "r.json"),
        ],
        120,
        {"OMP_NUM_THREADS": "1"},
    )
    assert done.code == 0, done.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["check"] is True and result["overhead"][0]["apart"] < 1e-5
    assert [row["exchange"] for row in result["overlap"]] == ["ring", "all-to-all"]
    assert all("own tokens first" in row["chunked"] for row in result["overlap"])
    assert done.output.count("own tokens first: error") == 2
