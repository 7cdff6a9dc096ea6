"""Collect evidence that a checkpoint filled every slot of an MoE layer by the map in force.

What `FusedMoE`'s loaders write is noted: which logical experts came, and which slots of this rank
each weight went to. A slot that nothing was seen to fill, by whatever loader, is a refusal when
loading ends: SGLang itself has no such check, and a loader that copies by position serves wrong
answers without an error.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from . import draft_layers
from .state import STATE, plan_here

_WEIGHT = re.compile(r"w\d+_q?weight(_packed)?")
"""Names of the matrices that every checkpoint must fill.

Scales and zero points may keep their defaults.
"""

_BIAS = re.compile(r"w\d+_(weight_)?bias")
"""Names of the biases that a checkpoint must fill where the layer was built with them.

Unquantized ones are uninitialised.
"""

_MUST_FILL = "_moe_placement_weights"
"""Attribute of a `FusedMoE`: names of those parameters, as they were when the layer was built."""

ALL_SHARDS = "all"
"""Instead of a shard, for a tensor that has all of them."""

_thread = (
    threading.local()
)  # loaders may work in threads: .expert is what the thread brings just now


def forget() -> None:
    """Begin anew: what was loaded so far is another model's."""
    STATE.brought.clear()
    STATE.filled.clear()


def in_force() -> Any:
    """Return SGLang's ``ExpertLocationMetadata``.

    None before it is made and for models without one.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    return get_global_expert_location_metadata()


def experts_of_slots(layer: Any) -> np.ndarray:
    """Return the logical expert of each routed slot of this rank; -1 for a slot without one.

    It goes by the map that SGLang loads by now. Under EPLB that map moves on; the placement of the
    start holds until SGLang has made it.

    Args:
        layer: a ``FusedMoE``; a draft's goes by its own row.
    """
    if (own := draft_layers.of_layer(layer)) is not None:
        return own.of_rank(layer.moe_ep_rank)
    slots = layer._num_local_routed
    physical = np.arange(slots) + layer.moe_ep_rank * slots
    if follows_map(layer):
        metadata = in_force()
        if metadata is not None:
            if layer.layer_id < metadata.num_layers:
                return metadata.physical_to_logical_map_cpu.numpy()[layer.layer_id, physical]
            return np.where(physical < metadata.num_logical_experts, physical, -1)
        placement = plan_here()
        if placement is not None and layer.layer_id in placement.layer_ids:
            return placement.local_experts(placement.row(layer.layer_id), layer.moe_ep_rank)
    return physical


def follows_map(layer: Any) -> bool:
    """Tell whether SGLang loads this layer by its map of experts: not a draft's."""
    return draft_layers.of_layer(layer) is None and getattr(layer, "uses_expert_location", True)


def experts_of_map(layer: Any) -> int | None:
    """Return the logical experts of the map that SGLang loads a layer by; None if not known."""
    if (own := draft_layers.of_layer(layer)) is not None:
        return own.num_logical
    if not follows_map(layer):
        return None
    metadata = in_force()
    if metadata is None:
        placement = plan_here()
        return None if placement is None else placement.num_logical_experts
    return metadata.num_logical_experts


def note_built(layer: Any) -> None:
    """Note which weights of a new ``FusedMoE`` a checkpoint must fill.

    Kernels may replace them after loading. MXFP4 layers have bias parameters of zeros even where
    the model has no biases (``with_bias`` False): these may stay.
    """
    from torch.nn.parameter import UninitializedParameter

    biased = bool(getattr(layer, "with_bias", False))
    weights = tuple(
        name
        for name, param in layer.named_parameters(recurse=False)
        if not isinstance(param, UninitializedParameter)
        and ((_WEIGHT.fullmatch(name) and param.dim() >= 3) or (biased and _BIAS.fullmatch(name)))
    )
    object.__setattr__(layer, _MUST_FILL, weights)


@contextmanager
def bringing(layer: Any, param: Any, weight_name: str, shard: str, expert: int) -> Iterator[None]:
    """Check what a loader that brings one logical expert fills meanwhile against the map."""
    STATE.brought[layer.layer_id, _name(layer, param, weight_name), shard].add(expert)
    before = getattr(_thread, "expert", None)
    _thread.expert = expert
    try:
        yield
    finally:
        _thread.expert = before


def note_slot(layer: Any, param: Any, weight_name: str, shard: str, slot: int) -> None:
    """Note that a loader is about to write a slot of this rank.

    Weight matrices count, and biases of layers that were built with them; a slot that was not
    reached through the map of experts does not.

    Raises:
        PlacementError: when the map in force has another expert there; nothing has been written
            yet.
    """
    expert = getattr(_thread, "expert", None)
    everywhere = getattr(param, "_sglang_require_global_experts", False)
    if expert is None or everywhere or not 0 <= slot < layer._num_local_routed:
        return
    held = int(experts_of_slots(layer)[slot])
    if held != expert:
        raise PlacementError(
            f"layer {layer.layer_id}: the loader puts {shard} of expert {expert} into slot {slot} "
            f"of rank {layer.moe_ep_rank}, which holds expert {held}: it goes round SGLang's map "
            "of experts; use --load-format auto with the model's original checkpoint, or leave "
            "the placement flags out"
        )
    weight = _name(layer, param, weight_name)
    if param.dim() >= 3 or weight in getattr(layer, _MUST_FILL, ()):
        STATE.filled[layer.layer_id, weight, shard].add(slot)


def note_all(layer: Any, param: Any, weight_name: str, shard: str, experts: int) -> None:
    """Note that a tensor of all ``experts`` was written to all slots of this rank, by the map."""
    key = layer.layer_id, _name(layer, param, weight_name), shard
    STATE.brought[key].update(range(experts))
    STATE.filled[key].update(range(layer._num_local_routed))


def _name(layer: Any, param: Any, weight_name: str) -> str:
    """Return the parameter's name in its layer.

    Models tell loaders that, or what the checkpoint calls it (Step 3.5).
    """
    parameters = getattr(layer, "_parameters", None) or {}
    own = (name for name, found in parameters.items() if found is param)
    return next(own, weight_name.rpartition(".")[2])


def _part(weight: str, shard: str) -> str:
    """Return what messages call a part of an expert."""
    if shard == ALL_SHARDS:
        return weight
    return f"{shard}'s bias" if weight.endswith("bias") else shard


def check(name: str, layer: Any) -> None:
    """Refuse a layer of whose slots nothing, or less than all, was seen to be filled.

    Args:
        name: the layer's name for messages.
        layer: a ``FusedMoE`` that has just been loaded.

    Raises:
        PlacementError: naming the weight, the slot and the expert.
    """
    number, held = layer.layer_id, experts_of_slots(layer)
    brought = {
        (weight, s): experts for (n, weight, s), experts in STATE.brought.items() if n == number
    }
    if not brought:
        raise PlacementError(
            f"{name}: its weights did not come through FusedMoE's loader, so that the placement "
            "was not heeded: use --load-format auto with the model's original checkpoint, or "
            "leave the placement flags out"
        )
    known = experts_of_map(layer)
    if known is None:  # a draft's own order: slots beyond its experts are never routed to
        known = 1 + max(max(experts) for experts in brought.values())
        held = np.where(held < known, held, -1)
    every, needed = set(range(known)), getattr(layer, _MUST_FILL, ())
    for (weight, shard), experts in brought.items():
        missing = sorted(every - experts)
        if missing and (weight in needed or not needed):
            part = _part(weight, shard)
            raise PlacementError(
                f"{name}: the checkpoint brought {part} of {len(every) - len(missing)} of "
                f"{len(every)} experts, expert {missing[0]} is missing: its slots hold no "
                "weights; use a complete checkpoint"
            )
    filled = {(weight, s): slots for (n, weight, s), slots in STATE.filled.items() if n == number}
    for weight in needed:
        shards = {shard for w, shard in filled if w == weight}
        half = shards & {"w1", "w3"}
        config = getattr(layer, "moe_runner_config", None)
        if not shards and weight.endswith("bias") and not any(w == weight for w, _ in brought):
            raise PlacementError(
                f"{name}: the checkpoint brought no {weight}, with which this layer was built: "
                f"the biases of rank {layer.moe_ep_rank} would stay unset; use a complete "
                "checkpoint, which has the experts' biases"
            )
        if not shards or (len(half) == 1 and getattr(config, "is_gated", True)):
            what = f"but {half.pop()} " if half else ""
            raise PlacementError(
                f"{name}: nothing {what}was seen to fill {weight} of the slots of rank "
                f"{layer.moe_ep_rank}: a loader went round SGLang's map of experts; use "
                "--load-format auto with the model's original checkpoint, or leave the placement "
                "flags out"
            )
    wanted = {slot for slot, expert in enumerate(held.tolist()) if expert >= 0}
    for (weight, shard), slots in filled.items():
        empty = sorted(wanted - slots)
        if empty:
            part = _part(weight, shard)
            more = f", nor {len(empty) - 1} more slots" if len(empty) > 1 else ""
            raise PlacementError(
                f"{name}: nothing filled slot {empty[0]} of rank {layer.moe_ep_rank} with {part} "
                f"of expert {held[empty[0]]}{more}: a loader went round SGLang's map of experts; "
                "use the model's original checkpoint, or leave the placement flags out"
            )
