"""The MoE layers of a vLLM model, and which expert lies in which of their slots."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

EPLB_ROW = "_moe_placement_eplb_row"
"""Attribute of a ``RoutedExperts`` that EPLB moves: (EPLB's model state, row of the layer in its tables)."""

EXPECTED = "_moe_placement_expected"
"""Attribute of a ``RoutedExperts`` that was verified: (its number, digest of every logical expert)."""


_LAYER = re.compile(
    r"(?:^|\.)(?:layers|blocks|h|meta_mlp)\.(\d+)(?:\.|$)"
)  # meta_mlp: Intern-S2-Mobius
# A draft model numbers its layers from 0 again, or names them differently in checkpoint and module.
_DRAFT = re.compile(r"(?:^|\.)(?:mtp\w*|eagle\w*|draft\w*|nextn\w*)(?:\.|$)")


def layer_id_of(name: str) -> int | None:
    """The layer's index in a module or weight name such as ``model.layers.3.mlp.experts``.

    None when there is no index, more than one, or the name is a draft model's: such a layer cannot be told
    for sure.
    """
    if _DRAFT.search(name):
        return None
    found = _LAYER.findall(name)
    return int(found[0]) if len(found) == 1 else None


def routed_layers(model: Any) -> dict[str, Any]:
    """Name -> ``RoutedExperts`` of every MoE layer of a model."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return {
        module.layer_name: module for module in model.modules() if isinstance(module, RoutedExperts)
    }


def mixture_of_experts(model: Any) -> Any:
    """The part of a model whose experts EPLB moves: the model, or the language model within it; None without one."""
    from vllm.model_executor.models import interfaces

    if hasattr(interfaces, "get_mixture_of_experts_model"):
        return interfaces.get_mixture_of_experts_model(model)
    for candidate in (
        model,
        model.get_language_model() if interfaces.supports_multimodal(model) else None,
    ):  # vLLM 0.25
        if candidate is not None and interfaces.is_mixture_of_experts(candidate):
            return candidate
    return None


def numbered(layers: dict[str, Any]) -> dict[str, int]:
    """A number for each layer: its index in the model where that is known and its own, else a negative one.

    A draft model's layers have no index of their own, and two towers of a model may both have a layer 3.
    """
    ids = [layer_id_of(name) for name in layers]
    return {
        name: -1 - row if n is None or ids.count(n) > 1 else n
        for row, (name, n) in enumerate(zip(layers, ids))
    }


def num_logical(layer: Any) -> int:
    """Logical experts of a layer, without redundant and fused shared ones."""
    return min(layer.moe_config.num_logical_experts, layer.expert_map_manager.global_num_experts)


def logical_of_physical(layer: Any) -> np.ndarray:
    """Logical expert of each physical one, int64 ``[physical experts]``: EPLB's table, or its first one before it has begun."""
    at = getattr(layer, EPLB_ROW, None)
    if at is not None:
        return at[0].physical_to_logical_map[at[1]].cpu().numpy()
    return np.arange(layer.expert_map_manager.global_num_experts) % num_logical(layer)


def slot_experts(layer: Any) -> np.ndarray:
    """Logical expert of each slot of this rank, int32 ``[slots]``; -1 for a slot that no expert maps to.

    Fused shared experts, which every rank holds, are numbered from the number of logical experts on.

    Args:
        layer: a ``RoutedExperts``.
    """
    manager = layer.expert_map_manager
    slots, physical = layer.local_num_experts, manager.global_num_experts
    experts = np.full(slots, -1, dtype=np.int32)
    table = np.arange(slots) if manager.expert_map is None else manager.expert_map.cpu().numpy()
    logical = logical_of_physical(layer)
    for number in np.flatnonzero(table >= 0).tolist():
        experts[table[number]] = (
            logical[number] if number < physical else num_logical(layer) + number - physical
        )
    return experts


def moved_slots(layer: Any) -> bool:
    """Whether some slot of this rank holds another expert than vLLM's own first placement puts there.

    That one is the first experts on rank 0, the next on rank 1 and so on, the first ranks taking one more where they do not
    divide, and under EPLB physical experts in the same order.

    Args:
        layer: a ``RoutedExperts``.
    """
    manager = layer.expert_map_manager
    base, more = divmod(manager.global_num_experts, manager.ep_size)
    first = manager.ep_rank * base + min(manager.ep_rank, more)
    experts = slot_experts(layer)
    routed = experts[experts < num_logical(layer)]
    return not np.array_equal(routed, np.arange(first, first + base + (manager.ep_rank < more)))
