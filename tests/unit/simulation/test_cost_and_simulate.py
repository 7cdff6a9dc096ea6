"""The cost model, the simulation and the comparison of plans against values known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement, PlacementError, Topology, get_strategy
from moe_placement_plugin.core.diff import compare, expert_bytes_of
from moe_placement_plugin.simulation.costmodel import (
    Calibration,
    LayerCost,
    Measurement,
    find_calibration,
    fit,
    shipped,
)
from moe_placement_plugin.simulation.simulate import (
    Cluster,
    Workload,
    align,
    dead_zone,
    simulate,
    step_time,
)
from tests.support.loads import skewed


def measurements(noise: float = 0.0, held_out: bool = True):
    rng = np.random.default_rng(0)
    result = []
    for tokens in (8, 64, 512, 4096):
        for active in (1, 4, 8):
            time = (20 + 6 * active + 0.05 * tokens) * (1 + noise * rng.standard_normal())
            result.append(Measurement(tokens=tokens, active_experts=active, microseconds=time))
            if held_out:
                exact = 20 + 6 * active + 0.05 * (tokens + 3)
                result.append(
                    Measurement(
                        tokens=tokens + 3, active_experts=active, microseconds=exact, held_out=True
                    )
                )
    return result


def test_fit_finds_the_coefficients_and_states_its_error_on_what_it_did_not_see():
    cost = fit(measurements())
    assert (cost.fixed, cost.per_expert, cost.per_token) == pytest.approx((20, 6, 0.05), rel=1e-6)
    assert cost.error == pytest.approx(0, abs=1e-9) and cost.held_out == 12
    noisy = fit(measurements(0.05))
    assert 0 < noisy.error < 0.05 < 0.2 and noisy.worst_error >= noisy.error
    assert fit(measurements(held_out=False)).error is None


def test_fit_tells_rows_from_tokens_where_they_are_known():
    """As measured on an H200: as many tokens on 32 experts as on 64 took a fifth longer, since twice as many rows had arrived."""
    grid = [
        (t, a, r) for t in (1000, 8000, 60_000) for a in (16, 64) for r in (t // 8, t // 4, t // 2)
    ]
    known = [
        Measurement(
            tokens=t, active_experts=a, rows=r, microseconds=15 + 1.5 * a + 0.02 * t + 0.03 * r
        )
        for t, a, r in grid
    ]
    cost = fit(known)
    assert (cost.fixed, cost.per_expert, cost.per_token, cost.per_row) == pytest.approx(
        (15, 1.5, 0.02, 0.03), rel=1e-6
    )
    assert (
        cost.time(1000, 16, 125) == pytest.approx(15 + 24 + 20 + 3.75)
        and "0.03000 per row" in cost.formula
    )
    blind = fit([*known[1:], known[0].model_copy(update={"rows": None})])
    assert blind.per_row == 0 and "row" not in blind.formula, (
        "one of which the rows are not known: none can be used"
    )
    held = known[0].model_copy(update={"rows": None, "held_out": True})
    assert fit([*known, held]).per_row == 0 and fit([*known, held]).error < 1, (
        "nor when it is one that is held out"
    )
    same = fit([m.model_copy(update={"rows": 500}) for m in known])
    assert same.per_row == 0 and same.fixed > 0, (
        "of rows that are always the same nothing can be told"
    )


def test_fit_never_goes_negative():
    falling = [
        Measurement(tokens=t, active_experts=a, microseconds=100 - 0.01 * t + 5 * a)
        for t in (1, 10, 1000)
        for a in (1, 2, 8)
    ]
    cost = fit(falling)
    assert cost.per_token == 0 and cost.per_expert > 0 and cost.fixed > 0


def test_fit_refuses_what_cannot_tell_tokens_from_experts():
    with pytest.raises(PlacementError, match="4 or more"):
        fit(measurements()[:3])
    with pytest.raises(PlacementError, match="told apart"):
        fit(
            [
                Measurement(tokens=8 * a, active_experts=a, microseconds=10.0 + a)
                for a in range(1, 6)
            ]
        )


def test_calibration_file_round_trip(tmp_path):
    path = tmp_path / "c.json"
    Calibration(device="NVIDIA H200", layer={"hidden_size": 64}, measurements=measurements()).write(
        path
    )
    again = Calibration.read(path)
    assert again.device == "NVIDIA H200" and fit(again.measurements).per_expert == pytest.approx(6)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"version": 9}))
    with pytest.raises(PlacementError, match="version 9"):
        Calibration.read(path)


def test_step_time_of_one_expert_per_rank_is_the_cost_of_the_hottest():
    placement = Placement(np.array([[0, 1]]), 2, (1, 1))
    cost = LayerCost(fixed=10, per_expert=5, per_token=1)
    time = step_time(placement, np.array([[1, 0]]), tokens=100, top_k=1, cost=cost)
    assert time.total_us == 10 + 5 + 100  # rank 0 gets all; expert 1 is never active
    assert time.ideal_us[0] == 10 + 2.5 + 50


@pytest.mark.parametrize("ranks", (1, 2, 4, 16))
def test_rows_follow_from_each_ranks_share(ranks):
    """Tokens whose six of 64 experts a router with noise chooses: some are hot, and a rank gets a token once, however many of its experts are."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 0.7, 64) + rng.gumbel(size=(4000, 64))
    chosen = np.argsort(-scores, axis=1)[:, :6]
    owner = np.repeat(np.arange(ranks), 64 // ranks)
    most = max(int((owner[chosen] == rank).any(axis=1).sum()) for rank in range(ranks))
    counts, rows = np.bincount(chosen.ravel(), minlength=64)[None], LayerCost(0, 0, 0, per_row=1)
    placement = Placement(np.arange(64)[None], 64, (64 // ranks,) * ranks)
    assert step_time(placement, counts, 4000, 6, rows).total_us == pytest.approx(most, rel=0.02)
    assert step_time(placement, counts, 4000, 6, rows, all_gather=True).total_us == 4000


def test_replicas_take_tokens_in_turn():
    placement = Placement(np.array([[0, 0]]), 1, (1, 1))
    cost = LayerCost(0, 0, 1)
    assert step_time(placement, np.array([[7]]), tokens=101, top_k=1, cost=cost).total_us == 51


def test_more_tokens_on_few_experts_can_beat_balance():
    """The dead zone: with weights dominating, the placement with equal tokens is no faster."""
    counts = np.array([[90, 10, 10, 90, 0, 0, 0, 0]])
    balanced = Placement(np.array([[0, 1, 4, 5, 3, 2, 6, 7]]), 8, (4, 4))
    cost = LayerCost(fixed=0, per_expert=100, per_token=0.001)
    hot = Placement(np.array([[0, 3, 4, 5, 1, 2, 6, 7]]), 8, (4, 4))
    even, skew = (step_time(p, counts, 64, 2, cost).total_us for p in (balanced, hot))
    assert balanced.overall_balancedness(counts) > 1.5 * hot.overall_balancedness(counts)
    assert skew == pytest.approx(even, rel=0.01)


def test_simulation_judges_on_the_next_window():
    quiet, moved = np.full((2, 8), 10), np.full((2, 8), 10)
    quiet[:, 0] = 1000
    moved[:, 5] = 1000
    load = ExpertLoad(np.stack([quiet, moved, quiet]).astype(np.int64))
    found = simulate(
        [Workload("w", load)],
        {n: get_strategy(n) for n in ("linear", "eplb")},
        Cluster(Topology(4), 4),
    )
    eplb = found.outcomes[1]
    # Window 0's plan replicates expert 0; on window 1, where expert 5 is hot, it cannot be balanced.
    assert eplb.next_window < 0.6 < eplb.overall
    assert found.best is eplb and found.outcomes[0].next_window == pytest.approx(
        found.outcomes[0].overall, rel=0.2
    )


def test_served_matrix_is_best_where_planned():
    a, b = skewed(1, seed=1), ExpertLoad(skewed(1, seed=2).counts[..., ::-1].copy())
    found = simulate(
        [Workload("a", a), Workload("b", b)],
        {"eplb": get_strategy("eplb")},
        Cluster(Topology(4), 4),
    )
    served = found.outcomes[0].served
    assert served[0, 0] > served[0, 1] and served[1, 1] > served[1, 0]


def test_verdict_says_when_balance_buys_nothing():
    even = ExpertLoad(np.full((1, 2, 16), 100, dtype=np.int64), phases=("decode",))
    found = simulate(
        [Workload("w", even)],
        {n: get_strategy(n) for n in ("linear", "zigzag")},
        Cluster(Topology(4)),
    )
    text = " ".join(found.verdict())
    assert "leave the placement as it is" in text and "Dead zone" in text and "calibration" in text
    skew = simulate(
        [Workload("w", skewed(phases=("decode",) * 3))],
        {n: get_strategy(n) for n in ("linear", "eplb")},
        Cluster(Topology(4), 4),
    )
    text = " ".join(skew.verdict())
    assert "eplb lowers" in text and "Dead zone" not in text


def test_dead_zone_formula():
    assert dead_zone(1) == 1.004 and dead_zone(32) == pytest.approx(1.724, abs=1e-3)


def test_align_keeps_layers_that_any_workload_used():
    a, b = np.zeros((1, 3, 4), np.int64), np.zeros((1, 3, 4), np.int64)
    a[0, 1], b[0, 2] = 1, 1
    aligned = align([Workload("a", ExpertLoad(a)), Workload("b", ExpertLoad(b))])
    assert [w.load.layer_ids for w in aligned] == [(1, 2), (1, 2)]


def test_moves():
    old = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 4, (2, 2))
    new = Placement(np.array([[1, 0, 2, 3], [0, 2, 1, 3]]), 4, (2, 2))
    moves = compare(old, new)
    # A swap within a rank crosses nothing; a swap across ranks crosses twice.
    assert moves.received.tolist() == [[0, 0], [1, 1]] and moves.changed_slots.tolist() == [2, 2]
    assert moves.total == 2 and moves.share == 0.25
    assert moves.bytes(10) == 20 and moves.seconds(10, 5.0) == 2.0
    assert compare(old, old).total == 0


def test_expert_bytes():
    r1 = {
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "quantization_config": {"quant_method": "fp8"},
    }
    assert expert_bytes_of(r1, "R1") == 3 * 7168 * 2048
    with pytest.raises(PlacementError, match="--expert-bytes"):
        expert_bytes_of({"hidden_size": 8}, "x")


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_calibration_fits_and_says_where_it_comes_from(name):
    found = find_calibration(name)
    cost = fit(found.measurements)
    # Of a third of R1's decode measurements the rows are not certain: they were left out.
    assert (
        cost.held_out >= {"r1-decode-h100": 80}.get(name, 100)
        and cost.error < 0.05
        and cost.per_token > 0
        and cost.per_row > 0
    )
    assert {"command", "date", "torch", "kernel", "load"} <= found.provenance.keys()
    assert "/" not in found.provenance["command"], "a folder of the machine that measured"
    assert found.summary.startswith(found.device) and found.layer["kernel"] in found.summary


def test_calibrations_are_shipped_for_prefill_and_decode():
    assert {find_calibration(name).layer["phase"] for name in shipped()} == {"prefill", "decode"}
