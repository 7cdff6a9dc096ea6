"""The MoE layers of a vLLM model."""

from __future__ import annotations

from typing import Any

import numpy as np


def routed_layers(model: Any) -> dict[str, Any]:
    """Name -> ``RoutedExperts`` of every MoE layer of a model."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)}


def slot_experts(layer: Any) -> np.ndarray:
    """Logical expert of each slot of this rank, int32 ``[slots]``; -1 for a slot that no expert maps to.

    Fused shared experts, which every rank holds, are numbered from the number of logical experts on.

    Args:
        layer: a ``RoutedExperts``.
    """
    manager = layer.expert_map_manager
    slots = layer.local_num_experts
    experts = np.full(slots, -1, dtype=np.int32)
    if manager.expert_map is None:
        experts[:] = np.arange(slots)
        return experts
    table = manager.expert_map.cpu().numpy()
    for expert in np.flatnonzero(table >= 0).tolist():
        experts[table[expert]] = expert
    return experts
