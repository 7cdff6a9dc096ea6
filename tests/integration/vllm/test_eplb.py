"""vLLM's EPLB with our placement to begin with and our planner to rebalance.

Live, on the CPU build.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_placement_plugin.lab.gpu.serving.server_logs import moved
from tests.integration.vllm.conftest import MOVING

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]


def differs(ours, theirs):
    return [
        n
        for n, (a, b) in enumerate(zip(ours["answers"], theirs["answers"]))
        if a["ids"] != b["ids"]
    ]


@pytest.mark.parametrize("name", MOVING)
def test_answers_equal_stock_while_experts_move(moving, stock, name):
    result, reference = (
        moving[0][name],
        stock[name.split()[0]],
    )  # the fused checkpoint holds the same weights
    assert "error" not in result, result.get("traceback")
    assert not differs(result, reference)
    ours, theirs = (np.array([a["logprobs"] for a in r["answers"]]) for r in (result, reference))
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", MOVING)
def test_experts_were_rebalanced_at_least_four_times_and_verified_each_time(moving, name):
    result, log = moving[0][name], moving[1][name]
    rearranged = len(re.findall(r"Rearranged experts\s+in", log))
    assert rearranged >= 4, log[-3000:]
    tables = [worker["tables"] for worker in result["workers"]]
    assert tables[0] == tables[1], "the ranks disagree about where experts lie"
    if "eplb" in name:
        assert re.search(r"expert rebalance (accepted|declined), .*: gain", log)
    if name == "glm eplb":  # told to move for any gain at all
        assert len(re.findall(r"expert rebalance accepted, the gain is worth the move", log)) >= 4
    assert re.search(r"verified \d+ slots after the exchange", log)
    # The serving benchmark reads the same lines.
    found = moved(log, "vllm")
    assert (
        found["engine_rebalances"] >= 4
        and found["exchanges"]
        and found["exchange_ms"] >= found["chunk_ms"] > 0
        and found["verify_ms"]
    )
    assert found["moved_bytes"] and bool(found["accepted"] + found["declined"]) == ("eplb" in name)


def test_the_first_placement_is_the_strategys(moving):
    assert re.search(
        r"EPLB begins with placement \w+ \(zigzag\), policy DefaultEplbPolicy",
        moving[1]["qwen fused checkpoint"],
    )
    assert re.search(r"policy PlannerPolicy", moving[1]["qwen eplb load"])
