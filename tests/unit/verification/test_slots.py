"""Which tensors of a layer are the experts'."""

from __future__ import annotations

import pytest

from moe_placement_plugin import PlacementError

torch = pytest.importorskip("torch", reason="torch comes with an engine")
from moe_placement_plugin.verification.slots import Unverifiable, expert_tensors  # noqa: E402

IGNORE = frozenset({"expert_map"})


def layer(**buffers):
    module = torch.nn.Module()
    module.w13_weight = torch.nn.Parameter(torch.randn(4, 6, 2))
    for name, tensor in {"expert_map": torch.arange(8), **buffers}.items():
        module.register_buffer(name, tensor)
    return module


def found(module):
    return set(expert_tensors(module, 4, frozenset({8, 9}), IGNORE, "layer 1"))


def test_every_tensor_with_a_row_for_each_slot_counts():
    module = layer(
        scale=torch.ones(4),
        zero=torch.zeros(4, 3, dtype=torch.uint8),
        shared=torch.ones(1),
        scalar=torch.tensor(1.0),
    )
    assert found(module) == {"w13_weight", "scale", "zero"}


def test_what_a_kernel_keeps_beside_the_module_counts_once():
    method = type("Method", (), {"__module__": "vllm.x"})()
    config = type("Config", (), {"__module__": "vllm.y"})()
    method.config, config.method = config, method  # a cycle
    config.w1_scale = torch.ones(4, 2)
    module = layer()
    config.again = module.w13_weight
    module.quant_method = method
    assert found(module) == {"w13_weight", "quant_method.config.w1_scale"}


def test_plain_attributes_of_the_module_and_of_a_method_that_is_a_module_count():
    module = layer()
    module.scales = torch.ones(4)
    module.quant_method = torch.nn.Module()
    module.quant_method.alphas = torch.ones(4, 3)
    module.quant_method.bias = torch.nn.Parameter(torch.ones(4))
    assert found(module) == {"w13_weight", "scales", "quant_method.alphas", "quant_method.bias"}


def test_a_tensor_as_long_as_the_model_has_experts_is_refused_unless_all_rows_agree():
    assert found(layer(scale=torch.ones(8))) == {"w13_weight"}
    with pytest.raises(
        PlacementError,
        match="layer 1: scale has 8 rows, one for every expert of the model, where this rank has 4",
    ):
        found(layer(scale=torch.arange(8.0)))


def test_a_layer_without_rows_for_slots_is_refused():
    module = torch.nn.Module()
    module.packed = torch.nn.Parameter(torch.randn(3, 5))
    with pytest.raises(
        PlacementError,
        match=r"none of its tensors has a row for each of the 4 slots \(\{'packed': \(3, 5\)\}\)",
    ):
        found(module)


def test_a_view_of_what_was_found_counts_once_and_one_that_mixes_slots_not_at_all():
    whole = torch.randn(4, 4, 8)
    module = layer(scale=whole)
    module.quant_method = type("Method", (), {"__module__": "vllm.x"})()
    module.quant_method.halved = whole[:, :2]
    module.quant_method.by_kernel = torch.randn(4, 6, 4).permute(
        2, 1, 0
    )  # slots last in memory: 4 rows by accident
    module.quant_method.turned = torch.randn(4, 6, 3).transpose(1, 2)
    assert found(module) == {"w13_weight", "scale", "quant_method.turned"}


def test_tensors_of_triton_kernels_are_unwrapped():
    wrapper = type("Tensor", (), {"__module__": "triton_kernels.tensor"})
    inner = torch.randn(4, 5, 2)
    module = torch.nn.Module()
    module.register_buffer("w13_bias", torch.randn(4, 5))
    module.w13_weight = wrapper()
    module.w13_weight.storage = type("Storage", (), {"data": inner})()
    assert found(module) == {"w13_bias", "w13_weight"}
    del module.w13_weight
    with pytest.raises(Unverifiable, match="w13_bias"):
        found(module)  # a bias alone says nothing about the weights
