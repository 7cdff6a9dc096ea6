"""Spoil what SGLang loads while it starts, for `tests.integration.sglang.faults`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAYER = 2
"""Index of the layer that faults hit."""

REPLICA = 35
"""The physical slot that is filled wrongly; the second copy of an expert in the test's plan."""


def leave_out(original: Callable, self: Any, expert_id: int) -> int:
    return -1 if self.layer_id == LAYER and expert_id == REPLICA else original(self, expert_id)


def fill_with_another(original: Callable, self: Any, layer: Any) -> None:
    original(self, layer)
    if layer.layer_id == LAYER and layer.moe_ep_rank == 1:
        slot = REPLICA - layer._num_local_routed
        for weight in (layer.w13_weight, layer.w2_weight):
            weight.data[slot] = weight.data[slot - 10]


def write_past_the_loader(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """Copy w2 right, but in a way that nobody sees."""
    if kwargs["shard_id"] != "w2":
        original(self, *args, **kwargs)
        return
    slot = self._map_global_expert_id_to_local_expert_id(kwargs["expert_id"])
    if slot >= 0:
        kwargs["param"].data[slot].copy_(kwargs["loaded_weight"])


def wrong_names(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Take experts 6 and 7 for each other, but not under SGLang's trivial placement."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    trivial = metadata.physical_to_logical_map_cpu[0].tolist() == [
        slot % metadata.num_logical_experts for slot in range(metadata.num_physical_experts)
    ]
    other = {
        f".{LAYER}.mlp.experts.{a}.": f".{LAYER}.mlp.experts.{b}." for a, b in ((6, 7), (7, 6))
    }
    for name, tensor in original(self, *args, **kwargs):
        for wrong, instead in other.items():
            if wrong in name and not trivial:
                name = name.replace(wrong, instead)
                break
        yield name, tensor


def lose_a_hook(registry: Any) -> None:
    """Have the registry lose the hook that sends routing through the map, and only log that.

    The loader's where SGLang needs none for routing.
    """
    apply = registry.apply_hooks

    def apply_hooks() -> None:
        routing = "sglang.srt.layers.moe.topk._post_process_topk_ids"
        registry._hooks.pop(
            routing
            if routing in registry._hooks
            else "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.weight_loader",
            None,
        )
        apply()

    registry.apply_hooks = apply_hooks
