"""Test replicas under vLLM's EPLB: which one a token takes on a CPU.

They also test what is loaded into redundant slots.
"""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin.engines.vllm.layers import EPLB_ROW

torch = pytest.importorskip("torch")


def test_routing_in_torch_is_the_kernels():
    """The replica is (t * 2654435769 mod 2^32) mod replicas, as in vLLM's Triton kernel.

    That is the replica of token t.
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
    """No weight was ever offered to redundant slots of some models.

    So it is in vLLM 0.25's GLM-4-MoE, and in MTP heads of all versions.
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
        """Return the physical experts that the down projection of expert 1 is offered to."""
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
