"""Test the comparison of measured throughput with what the cost model says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin import ExpertLoad, PlacementError, get_strategy  # noqa: E402
from moe_placement_plugin.core.topology import Topology  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.models import MODELS  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.prediction import (  # noqa: E402
    Predictor,
    cost_of,
    costs,
    layer_times,
    predict,
    predict_layers,
    step_tokens,
)
from moe_placement_plugin.lab.gpu.serving.report import layers_in_words  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import WORKLOADS  # noqa: E402
from moe_placement_plugin.simulation.cluster import Cluster  # noqa: E402
from moe_placement_plugin.simulation.costmodel import LayerCost  # noqa: E402

COST = LayerCost(fixed=10.0, per_expert=0.5, per_token=0.01)


@pytest.fixture
def layers():
    load = ExpertLoad((1000 * np.random.default_rng(0).lognormal(0, 1.0, (6, 64))).astype(np.int64))
    placements = {
        name: get_strategy(name).place(Cluster(Topology.even(8)).request(load))
        for name in ("linear", "zigzag", "eplb")
    }
    return layer_times(placements, load.total, placements["linear"], 8192, 8, COST)


def test_layers_of_a_better_placement_are_shorter_and_the_ideal_ones_shortest(layers):
    assert layers["linear"] > layers["eplb"] > layers["ideal"]
    assert layers["ideal"] == pytest.approx(6 * (10 + 0.5 * 8 + 0.01 * 8192), rel=0.05)


def test_every_rank_has_all_tokens_rows():
    even = get_strategy("linear").place(
        Cluster(Topology.even(8)).request(ExpertLoad(np.ones((2, 64), np.int64)))
    )
    found = layer_times(
        {"linear": even},
        np.ones((2, 64), np.int64),
        even,
        8192,
        8,
        LayerCost(0.0, 0.0, 0.0, per_row=0.5),
    )
    assert found == {"linear": 2 * 0.5 * 8192, "ideal": 2 * 0.5 * 8192}


def test_a_server_that_follows_the_model_is_predicted(layers):
    """Attention and all else take 700 us per step, the MoE layers what the model says.

    At last one server takes 10% more.
    """
    measured = {name: 8192e6 / (700 + time) for name, time in layers.items()} | {"our EPLB": 1.0}
    found = predict(layers, measured, "linear")
    assert set(found) == {"zigzag", "eplb"}
    for name, one in found.items():
        assert one["predicted"] == pytest.approx(measured[name]) and one["error"] == pytest.approx(
            0, abs=1e-9
        )
    measured["eplb"] /= 1.1
    assert predict(layers, measured, "linear")["eplb"]["error"] == pytest.approx(0.1)


def test_nothing_is_predicted_from_servers_that_are_alike(layers):
    assert (
        predict(layers | {"linear": layers["ideal"] * 1.005}, dict.fromkeys(layers, 1.0), "linear")
        == {}
    )
    assert predict({"linear": 2.0, "eplb": 1.0}, {"linear": 1.0, "eplb": 1.0}, "linear") == {}


def test_layers_are_predicted_relative_to_the_first_servers(layers):
    """The kernels take 5% more than the model says throughout, and one placement's another 10%."""
    measured = {name: 1.05 * time for name, time in layers.items()} | {"our EPLB": 1.0}
    measured["zigzag"] *= 1.1
    found = predict_layers(layers, measured, "linear")
    assert set(found) == {"linear", "zigzag", "eplb", "ideal"}
    errors = {name: one["error"] for name, one in found.items()}
    assert errors == pytest.approx(
        {"linear": 1 / 1.05 - 1, "zigzag": 1 / 1.1 - 1, "eplb": 0, "ideal": 0}
    )
    said = layers_in_words("prefill", found)
    assert (
        "linear" in said
        and f"zigzag {layers['zigzag'] / layers['linear']:.3f} times that predicted" in said
        and "measured (-9.1%)" in said
    )
    assert predict_layers(layers, measured | {"linear": 0.0}, "linear") == {}, (
        "a profile without kernels of the experts"
    )
    assert predict_layers(
        layers, {"eplb": 1.0}, "linear"
    ) == {} and "no prediction" in layers_in_words("decode", {})


def test_a_profile_is_predicted_as_what_was_asked_in_it():
    """A step of 128 tokens decodes, and prompts are 16 of 4096.

    Whatever the number of steps, and whatever they were cut into.
    """
    model = replace(MODELS["tiny"], experts=64)
    load = ExpertLoad(np.ones((len(model.moe_layers), 64), np.int64), tuple(model.moe_layers))
    placed = {"stock": get_strategy("linear").place(Cluster(Topology.even(8)).request(load))}
    predictor = Predictor(
        {"decode": LayerCost(0.0, 0.0, 1.0), "prefill": LayerCost(0.0, 0.0, 0.0, per_row=1.0)},
        model,
        8,
        load,
        placed,
        "stock",
    )
    profile = {"experts": 100.0, "experts_total": 131072.0}
    decode, prefill = (
        predictor.layers(name, {"stock": profile, "our EPLB": profile})
        for name in ("decode", "prefill")
    )
    layers = len(model.moe_layers)
    assert set(decode) == set(prefill) == {"stock"}, "of a placement that moves nothing is known"
    assert decode["stock"]["measured"] == 100.0 * layers and decode["stock"][
        "predicted"
    ] == pytest.approx(layers * 128 * model.top_k / 8, rel=0.5)
    assert prefill["stock"] == {
        "predicted": layers * 65536.0,
        "measured": 131072.0,
        "error": layers * 65536 / 131072 - 1,
    }


def test_a_calibration_for_each_phase(tmp_path):
    known = costs(["r1-prefill-h100", "r1-decode-h100"])
    assert set(known) == {"prefill", "decode"}
    assert (
        cost_of("decode", known) is known["decode"]
        and cost_of("prefill", known) is cost_of("mixed", known) is known["prefill"]
    )
    one = costs(["r1-decode-h100"])
    assert cost_of("prefill", one) is one["decode"] and costs([]) == {}
    with pytest.raises(PlacementError, match="r1-decode-h100: a second one for decode"):
        costs(["r1-decode-h100", "r1-decode-h100"])


def test_tokens_of_a_step():
    assert (
        step_tokens("prefill", WORKLOADS["prefill"]) == 16384
        and step_tokens("decode", WORKLOADS["decode"]) == 64
    )
