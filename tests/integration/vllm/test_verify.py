"""Test fingerprints in a real vLLM: what was corrupted is found, and named.

What was not is served.
"""

from __future__ import annotations

import pytest

from tests.integration.vllm.conftest import FAULTS, ONE_EACH, TWO_RANKS, run_cases
from tests.support.children import python_path
from tests.support.faults import WEIGHT_FAULTS
from tests.support.paths import FAULTS_SITE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

LOADING = {
    "filter as upstream": (
        {"expert_placement_file": "uneven", "enable_ep_weight_filter": True},
        "the checkpoint brought w2_weight (w2) for",
        "was never filled: the checkpoint is incomplete, or a loader left the placement out of "
        "account",
    ),
    "replica never filled": (
        {"expert_placement_strategy": "zigzag"},
        "model.layers.2.mlp.experts: the checkpoint brought w2_weight (w2) for 14 of 15 slots of "
        "EP rank 1",
        "slot 4 (expert 9) was never filled",
    ),
    "neighbour's weights": (
        {"expert_placement_strategy": "zigzag", "expert_placement_verify": "checkpoint"},
        "the weights that were loaded are not those of the checkpoint: layer 1, slot 0 of rank 0 "
        "should hold expert 0",
        "which hold expert 29",
    ),
    "map changed": (
        {"expert_placement_strategy": "zigzag"},
        "model.layers.3.mlp.experts: the expert map in force on EP rank",
        "remove that plugin or the placement flag",
    ),
}
"""Fault while loading -> (arguments, what the log must say)."""


@pytest.fixture(scope="module")
def loading(checkpoints, files, tmp_path_factory):
    """Return (result, log) of each fault.

    Each is a start of its own that must not come to an end, one after the other in one process.
    """
    cases = []
    for fault, (more, *_) in LOADING.items():
        more = {k: files[v] if k.endswith("file") else v for k, v in more.items()}
        # The fault is in the workers: they are started with the case's environment.
        env = {**ONE_EACH, "TEST_LOAD_FAULT": fault, "PYTHONPATH": python_path(FAULTS_SITE)}
        cases.append(
            {
                "name": fault,
                "engine": {"model": checkpoints["qwen"], **TWO_RANKS, **more},
                "env": env,
            }
        )
    folder = tmp_path_factory.mktemp("loading")
    results = run_cases(folder, cases, {}, 600)
    logs = {
        part.partition("\n")[0].strip(): part
        for part in (folder / "log").read_text().split("=== case ")
    }
    return {fault: (results[fault], logs.get(fault, "")) for fault in LOADING}


def test_every_fault_in_a_serving_engine_is_found_and_what_is_put_back_passes(placed):
    found = placed["qwen balanced"]["faults"]
    assert set(FAULTS) == set(found) and len(found) >= 24 and set(WEIGHT_FAULTS) < set(found)
    for fault, workers in found.items():
        other, message = (worker["message"] for worker in workers)
        print(f"{fault:40} {message}")
        assert message is not None, f"{fault} was not seen by the rank that has it"
        assert other is None, f"{fault}: a rank whose weights are right complains: {other}"
        assert [worker["after"] for worker in workers] == [None, None], f"{fault} was put back"
        if fault in WEIGHT_FAULTS:
            where = (
                "layer 2, slot 0 of rank 1"
                if "off by one" in fault
                else "layer 2, slot 3 of rank 1 should hold expert 18"
            )
            assert where in message, message


@pytest.mark.parametrize(
    "fault, part",
    [
        ("one bit of w13", "it differs in w13_weight, which"),
        ("zero point changed", "it differs in w13_qzeros, which"),
        ("another expert's weights", "which hold expert 22"),
        ("map changed without moving weights", "which hold expert"),
        ("tensor as long as the model has experts", "w13_input_scale has 30 rows"),
        (
            "tensor lost",
            "expected ('w13_qzeros', 'w13_weight', 'w13_weight_scale', 'w2_bias', 'w2_weight')",
        ),
    ],
)
def test_the_message_says_what_is_wrong(placed, fault, part):
    assert part in placed["qwen balanced"]["faults"][fault][1]["message"]


@pytest.mark.parametrize("fault", LOADING)
def test_a_fault_while_loading_stops_the_server(loading, fault):
    result, log = loading[fault]
    assert "error" in result, f"vLLM served in spite of {fault}"
    for part in LOADING[fault][1:]:
        assert part in log, log[-3000:]


def test_the_checkpoint_level_serves_what_is_right(placed):
    assert "answers" in placed["glm balanced"], placed["glm balanced"]


def test_what_was_verified_is_logged(placed_log):
    assert "slots in 4 layers of this rank (replicas)" in placed_log
    assert "slots in 3 layers of this rank (replicas and checkpoint)" in placed_log
