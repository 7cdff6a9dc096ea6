"""Test SGLang's EPLB with our placement to begin with and our planner to rebalance.

The engine is that for CPUs.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_placement_plugin.lab.gpu.serving.server_logs import moved
from tests.integration.sglang.engines import LONG, Outcome, case, run_cases
from tests.support.children import engine_lock
from tests.support.rebalance_rules import ANY_GAIN

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TOLERANCE = 1e-4
"""Largest difference of a log probability between two placements, one on one rank, float32.

What differs is the order in which partial sums are added.
"""


@pytest.fixture(scope="module")
def moving(models, tmp_path_factory) -> Outcome:
    """Run an engine whose experts move all the time."""
    often = {
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 2,
        "eplb_rebalance_layers_per_chunk": 3,
    }
    wanted = case(
        "moving",
        models["qwen32"],
        2,
        2,
        expert_placement_strategy="eplb",
        ep_num_redundant_experts=4,
        expert_rebalance=ANY_GAIN,
        **often,
    )
    with engine_lock():
        return run_cases([wanted | {"max_new_tokens": LONG}], tmp_path_factory.mktemp("engines"))[
            "moving"
        ]


def test_answers_stay_while_experts_move(moving, stock):
    assert "rows" in moving.result, moving.log[-3000:]
    assert moving.ids == stock["qwen32"].ids and len(moving.ids[0]) == LONG
    difference = np.abs(np.array(moving.values) - np.array(stock["qwen32"].values)).max()
    print(f"log probabilities differ by at most {difference:.1e}")
    assert difference < TOLERANCE


def test_experts_moved_at_least_four_times_and_were_verified_each_time(moving):
    log = moving.log
    for rank in (0, 1):
        mine = [line for line in log.splitlines() if f"TP{rank} EP{rank}]" in line]
        accepted = [line for line in mine if "expert rebalance accepted" in line]
        assert len(accepted) >= 4, log[-3000:]
        assert len([line for line in mine if re.search(r"verified \d+ slots again", line)]) >= len(
            accepted
        )
    # The serving benchmark reads the same lines.
    found = moved(log, "sglang")
    assert (
        found["accepted"] >= 4
        and found["engine_rebalances"] >= 4
        and found["exchange_ms"] >= found["chunk_ms"] > 0
    )
    assert found["moved_bytes"] and found["verify_ms"]
    decisions = [re.findall(rf"TP{rank} .*expert rebalance (.*)", log) for rank in (0, 1)]
    assert decisions[0] == decisions[1], "the ranks disagree"
    for patch in ("eplb-rebalance", "eplb-plan", "eplb-update"):
        assert moving.processes_with(f"patch {patch} in use") == {"TP0 EP0", "TP1 EP1"}
