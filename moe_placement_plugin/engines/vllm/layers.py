"""The MoE layers of a vLLM model."""

from __future__ import annotations

from typing import Any


def routed_layers(model: Any) -> dict[str, Any]:
    """Name -> ``RoutedExperts`` of every MoE layer of a model."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)}
