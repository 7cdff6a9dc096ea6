"""vLLM's EPLB with our placement to begin with and our planner to rebalance.

Live, on the CPU build.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_placement_plugin.engines.vllm.layers import EPLB_ROW
from moe_placement_plugin.lab.gpu.serving.server_logs import moved
from tests.integration.vllm.conftest import MOVING

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

torch = pytest.importorskip("torch")


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


def test_routing_in_torch_is_the_kernels():
    """Replica of token t and expert e.

    (t * 2654435769 mod 2^32) mod replicas, as in vLLM's Triton kernel.
    """
    from moe_placement_plugin.engines.vllm.eplb_cpu import map_and_record

    table = torch.tensor([[0, 3, 5], [1, -1, -1], [2, 4, -1]])
    count = torch.tensor([3, 1, 2])
    ids = torch.tensor([[0, 1], [0, 2], [2, 0], [1, 2], [0, 2]], dtype=torch.int32)
    seen = torch.zeros(6, dtype=torch.int32)
    found = map_and_record(ids, seen, table, count, torch.tensor(True), torch.tensor(4))
    expected = [
        [int(table[e, (t * 2654435769 % 2**32) % int(count[e])]) for e in row]
        for t, row in enumerate(ids.tolist())
    ]
    assert found.tolist() == expected and found.dtype == torch.int32
    assert seen.tolist() == np.bincount(np.array(expected[:4]).ravel(), minlength=6).tolist()
    map_and_record(ids, seen, table, count, torch.tensor(False))
    assert seen.sum() == 8
    table[2] = torch.tensor([2, 4, 5])  # of the last expert, which index -1 would find
    padded = torch.tensor([[1, 2], [-1, -1]], dtype=torch.int32)
    assert map_and_record(padded, seen, table, count, torch.tensor(True))[1].tolist() == [-1, -1]
    assert seen.sum() == 10


def test_a_fused_tensor_gets_rows_for_redundant_experts():
    from moe_placement_plugin.engines.vllm.eplb_replicas import with_replicas

    layer = type("Layer", (), {"layer_name": "model.layers.0.mlp.experts"})
    fused = torch.arange(4 * 6).view(4, 2, 3)
    assert with_replicas(layer, "gate_up_proj", fused, 4, 3)[4:].equal(fused[:3])
    assert (
        with_replicas(layer, "2.w1_packed", fused, 4, 3) is fused
    )  # one expert's own three-dimensional weight
    assert with_replicas(layer, "bias", fused[0], 4, 3).shape == (2, 3)
    assert EPLB_ROW.startswith("_")


def test_models_that_name_no_redundant_experts_load_them_all_the_same():
    """vLLM 0.25's GLM-4-MoE, and MTP heads of all versions.

    No weight was ever offered to their redundant slots.
    """
    import inspect
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.models import glm4_moe_mtp

    from moe_placement_plugin.engines.common.patching import PatchSet
    from moe_placement_plugin.engines.vllm.eplb_replicas import weight_patches

    assert "num_redundant_experts" not in inspect.getsource(glm4_moe_mtp), (
        "this one names them now: take another, or drop the patch"
    )

    def model(physical):
        layer = RoutedExperts.__new__(RoutedExperts)
        torch.nn.Module.__init__(layer)
        layer.layer_name, layer.moe_config = (
            "model.layers.1.mlp.experts",
            SimpleNamespace(num_experts=physical, num_logical_experts=8),
        )
        return torch.nn.ModuleList([layer])

    def slots(physical, **more):
        """Physical experts that the down projection of expert 1 is offered to."""
        mapping = fused_moe_make_expert_params_mapping(
            model(physical), "gate_proj", "down_proj", "up_proj", 8, **more
        )
        return [number for _, weight, number, _ in mapping if weight == "experts.1.down_proj."]

    assert slots(10) == [1]  # without the patch
    patches = PatchSet(weight_patches())
    patches.apply()
    try:
        assert slots(10) == [1, 9]
        assert slots(10, num_redundant_experts=2) == [1, 9]
        assert slots(8) == [1]  # a draft model without EPLB has no such slots
    finally:
        patches.undo()
