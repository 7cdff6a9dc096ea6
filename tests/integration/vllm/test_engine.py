"""Test that a real vLLM answers as stock vLLM on one rank, whatever the placement.

That is, its tokens and log probabilities.
"""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin import PlacementRequest, Topology, get_strategy
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_json import read_plan

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

FLOAT32_TOLERANCE = 1e-4
"""Largest difference of a log probability in float32.

Two ranks add the experts' outputs in another order than one, which in float32 (24 bits) was seen to
move log probabilities by 1e-5. The sabotaged run shows what a wrong expert does: more than a
thousand times as much.
"""

BFLOAT16_TOLERANCE = 0.25
"""Largest difference of a log probability in bfloat16.

It has 8 bits, so the same reordering moves log probabilities by hundredths and may flip a near tie;
only the answers up to the first different token are compared.
"""

CASES = [
    "qwen linear",
    "qwen zigzag",
    "qwen balanced",
    "qwen eplb filter",
    "qwen uneven plan filter",
    "qwen zigzag compiled",
    "qwen zigzag four ranks",
    "glm zigzag filter",
    "glm balanced",
    "glm round_robin own core",
]


def answers_of(results, name):
    result = results[name]
    assert "error" not in result, f"{result['error']}\n{result.get('traceback', '')}"
    return result["answers"]


def largest_difference(a, b):
    return max(
        float(np.abs(np.subtract(x["logprobs"], y["logprobs"])).max())
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logprobs_equal_stock(stock, placed, name):
    expected = answers_of(stock, name.split()[0])
    answers = answers_of(placed, name)
    assert [a["ids"] for a in answers] == [a["ids"] for a in expected]
    assert largest_difference(answers, expected) < FLOAT32_TOLERANCE


def test_bfloat16_differs_by_rounding_only(stock, placed):
    expected, answers = answers_of(stock, "qwen-bf16"), answers_of(placed, "qwen-bf16 zigzag")
    compared = 0
    for a, b in zip(answers, expected, strict=True):
        same = next(
            (i for i, (x, y) in enumerate(zip(a["ids"], b["ids"])) if x != y), len(a["ids"])
        )
        compared += same
        difference = np.abs(np.subtract(a["logprobs"][:same], b["logprobs"][:same]))
        assert difference.size == 0 or difference.max() < BFLOAT16_TOLERANCE
    assert compared >= len(expected) * len(expected[0]["ids"]) // 2


def test_a_wrong_expert_would_be_seen(stock, placed):
    wrong = placed["qwen zigzag"]["sabotaged"]
    assert [a["ids"] for a in wrong] != [a["ids"] for a in answers_of(stock, "qwen")]
    assert largest_difference(wrong, answers_of(stock, "qwen")) > 1000 * FLOAT32_TOLERANCE


EXPECTED = {
    "qwen zigzag": ("zigzag", range(4), 30, None),
    "qwen balanced": ("balanced", range(4), 30, None),
    "qwen eplb filter": ("eplb", range(4), 30, "qwen"),
    "glm zigzag filter": ("zigzag", range(1, 4), 32, None),
    "glm round_robin own core": ("zigzag", range(1, 4), 32, None),
    "qwen zigzag four ranks": ("zigzag", range(4), 30, None),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_map_in_force_in_every_worker_is_the_strategys(placed, files, name):
    strategy, layers, experts, load = EXPECTED[name]
    ranks = 4 if "four" in name else 2
    request = PlacementRequest(
        len(layers),
        experts,
        Topology(ranks),
        layer_ids=tuple(layers),
        load=read_load(files[load]) if load else None,
    )
    check_maps(placed[name]["workers"], get_strategy(strategy).place(request))


def test_an_uneven_plan_that_differs_by_layer_is_in_force(placed, files):
    plan = read_plan(files["uneven"])
    assert len({tuple(row) for row in plan.physical_to_logical.tolist()}) == 4
    check_maps(placed["qwen uneven plan filter"]["workers"], plan)


def check_maps(workers, plan):
    assert len(workers) == plan.num_ranks and len({w["pid"] for w in workers}) == plan.num_ranks
    for rank, worker in enumerate(workers):
        assert len(worker["maps"]) == plan.num_layers
        for layer_name, expert_map in worker["maps"].items():
            layer_id = int(layer_name.split(".layers.")[1].split(".")[0])
            np.testing.assert_array_equal(expert_map, plan.expert_map(plan.row(layer_id), rank))


@pytest.mark.parametrize("name", CASES)
def test_patches_ran_in_every_worker_process(placed, name):
    layers = 4 if name.startswith("qwen") else 3
    for worker in placed[name]["workers"]:
        hits = worker["hits"]
        times = (
            2 if name == "glm balanced" else 1
        )  # it is loaded twice to be compared with a clean load
        assert (
            hits["layer-placement"] == hits["expert-map"] == layers * times
            and hits["load-report"] == 1
        )
        assert hits["cpu-cpu_moe-CPUUnquantizedExperts"] > 0
        assert (hits["weight-filter"] == 1) == ("filter" in name)


def test_a_static_placement_adds_no_operator_to_a_forward_pass(placed):
    # Operators of the dispatcher have a namespace; what else the profiler lists are torch.compile's
    # own doings.
    linear, zigzag = (
        [
            {name: count for name, count in worker.items() if "::" in name}
            for worker in placed[case]["operators"]
        ]
        for case in ("qwen linear", "qwen zigzag")
    )
    assert any("moe" in name for name in linear[0]) and len(linear[0]) > 50
    assert zigzag == linear


def test_stock_stays_stock(stock):
    assert not any("moe_placement" in str(result) for result in stock.values())
