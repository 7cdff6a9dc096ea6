"""Load checkpoints that hold all experts of a layer in one tensor.

Stock SGLang copies the tensor's rows by position. Here rows are put into the order of the slots by
the map in force before the model copies them, redundant slots included.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from . import evidence, expert_reader
from .hook_registry import Hook
from .layers import expert_layers
from .state import plan_here

_STACKED = re.compile(r"\.experts\.(gate_up_proj|down_proj)_(blocks|scales|bias)$")
"""What gpt-oss's MXFP4 checkpoints call tensors of all experts."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_thread = threading.local()  # .in_slot_order: tensors of all experts have the order of the slots


def rows_of_slots(layer: Any, experts: int) -> np.ndarray:
    """Return the row of a tensor of all ``experts`` for each routed slot of this rank.

    A slot without an expert gets row 0.

    Raises:
        PlacementError: when the tensor has fewer or more experts than the map.
    """
    held = evidence.experts_of_slots(layer)
    number = evidence.experts_of_map(layer)
    if number is not None and experts != number:
        raise PlacementError(
            f"layer {layer.layer_id}: the checkpoint brings {experts} of {number} experts at "
            "once, so that it is not known which: use a checkpoint with a tensor per expert, or "
            "leave the placement flags out"
        )
    return np.where((held >= 0) & (held < experts), held, 0)


def load_fused(
    original: Callable, self: Any, param: Any, loaded_weight: Any, weight_name: str, shard_id: str
) -> None:
    """Run `FusedMoE.weight_loader_fused` with the rows of this rank's slots.

    It fills all slots at once. Stock SGLang copies the checkpoint's experts by position; with
    expert parallelism the shapes do not even agree.

    Raises:
        PlacementError: when it is not known which experts the tensor has.
    """
    if plan_here() is None:
        original(self, param, loaded_weight, weight_name, shard_id)
        return
    experts = loaded_weight.shape[0]
    rows = rows_of_slots(self, experts)
    if expert_reader.intercepted(self, param, loaded_weight, weight_name, shard_id, None, original):
        return
    original(self, param, loaded_weight[rows.tolist()], weight_name, shard_id)
    if "weight" in weight_name:  # the original only warns about what it does not know
        evidence.note_all(self, param, weight_name, shard_id, experts)


def accepts_all_experts(layer: Any, loaded_weight: Any, weight_name: str) -> bool:
    """Tell whether a tensor of all experts has been put into the order of the slots.

    It is one that `FusedMoE.weight_loader` gets.

    Raises:
        PlacementError: when it does not have a row for each slot of this rank.
    """
    if not getattr(_thread, "in_slot_order", False):
        return False
    slots = layer._num_local_routed
    if loaded_weight.shape[0] != slots:
        raise PlacementError(
            f"layer {layer.layer_id}: the model's loader takes {loaded_weight.shape[0]} rows of "
            f"{weight_name} for the {slots} slots of rank {layer.moe_ep_rank}: this version of "
            "the model is not understood; leave the placement flags out"
        )
    return True


def load_gpt_oss_mxfp4(original: Callable, self: Any, weights: Iterable[tuple[str, Any]]) -> Any:
    """Run `GptOssForCausalLM._load_mxfp4_experts_weights` with tensors in the order of the slots.

    It cuts tensors of all experts into equal blocks, one per rank. It also gets the number of slots
    for that of experts.
    """
    if plan_here() is None:
        return original(self, weights)
    layers = {layer.layer_id: layer for layer in expert_layers(self).values()}
    slots = {layer._num_global_routed for layer in layers.values()}
    before = self.config.num_local_experts
    _thread.in_slot_order = True
    try:
        if slots:
            (self.config.num_local_experts,) = slots
        return original(self, _in_slot_order(weights, layers))
    finally:
        self.config.num_local_experts = before
        _thread.in_slot_order = False


def _in_slot_order(
    weights: Iterable[tuple[str, Any]], layers: dict[int, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors with a row for each slot of the model.

    Only rows of this rank's slots hold anything.
    """
    for name, tensor in weights:
        found = _LAYER.search(name)
        layer = layers.get(int(found[1])) if found and _STACKED.search(name) else None
        if layer is not None:
            rows = rows_of_slots(layer, tensor.shape[0])
            first = layer.moe_ep_rank * layer._num_local_routed
            stretched = tensor.new_empty((layer._num_global_routed, *tensor.shape[1:]))
            stretched[first : first + len(rows)] = tensor[rows.tolist()]
            tensor = stretched
        yield name, tensor


def positional_hooks() -> list[Hook]:
    """Return the hooks round loaders that take experts by position."""
    return [
        Hook(
            name="fused-loader",
            target="sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.weight_loader_fused",
            hook=load_fused,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id"),
            why="checkpoints with all experts in one tensor are loaded by position",
            removable_when="weight_loader_fused heeds the map of experts",
        ),
        Hook(
            name="gpt-oss-loader",
            target="sglang.srt.models.gpt_oss:GptOssForCausalLM._load_mxfp4_experts_weights",
            hook=load_gpt_oss_mxfp4,
            relies_on=("weights",),
            why="gpt-oss's MXFP4 checkpoints are cut into equal blocks of experts, past the map "
            "of experts: wrong output",
            removable_when="the model's loader heeds the map of experts",
        ),
    ]
