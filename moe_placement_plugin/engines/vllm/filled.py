"""While loading: which slots the checkpoint fills. A slot that nothing fills computes with whatever was in memory."""

from __future__ import annotations

import logging
from typing import Any

from ...errors import PlacementError
from ..patching import Patch
from .layers import EXPECTED, num_logical, slot_experts

logger = logging.getLogger("vllm.moe_placement_plugin")

_FILLED = "_moe_placement_filled"


def watch(layer: Any, by_position: bool) -> None:
    """Note from now on what is loaded into a layer.

    Args:
        layer: a ``RoutedExperts`` whose parameters were just made.
        by_position: whether expert e of the model is row e - first of this rank, so that rows may be copied in bulk.
    """
    object.__setattr__(layer, _FILLED, (by_position, {}))


def _weight_loader(original):
    def weight_loader(
        self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
    ):
        done = original(
            self, param, loaded_weight, weight_name, shard_id, expert_id, *args, **kwargs
        )
        if hasattr(self, EXPECTED):
            # New weights for a model that serves (reload_weights, reinforcement learning): the digests are of the old ones.
            logger.warning(
                "moe_placement_plugin: %s gets new weights; it is not verified any more",
                self.layer_name,
            )
            object.__delattr__(self, EXPECTED)
        watched = getattr(self, _FILLED, None)
        if watched is not None:
            by_position, filled = watched
            key = (weight_name.rpartition(".")[2], shard_id)
            if loaded_weight.dim() == param.dim() >= 2:
                if not by_position:
                    raise PlacementError(
                        f"{self.layer_name}: the checkpoint brings {weight_name} of {loaded_weight.shape[0]} experts at once, which "
                        "vLLM copies by position, past the map of experts: use a checkpoint with a tensor per expert, or leave the "
                        "placement flag out"
                    )
                filled.setdefault(key, set()).update(range(param.shape[0]))
            else:
                slot = self.expert_map_manager.map_global_to_local(expert_id)
                if slot >= 0:
                    filled.setdefault(key, set()).add(int(slot))
        return done

    return weight_loader


def check_filled(layer: Any) -> None:
    """Refuse a layer of which some slots were filled and others were not.

    A loader that copies in a way of its own is noted for no slot at all, and is left to the fingerprints.

    Args:
        layer: a ``RoutedExperts`` after loading.

    Raises:
        PlacementError: naming layer, weight, slot and expert.
    """
    watched = getattr(layer, _FILLED, None)
    if watched is None:
        return
    object.__delattr__(layer, _FILLED)
    experts = slot_experts(layer)
    routed = {
        slot for slot, expert in enumerate(experts.tolist()) if 0 <= expert < num_logical(layer)
    }
    for (weight, shard), slots in watched[1].items():
        missing = sorted(routed - slots)
        if missing and slots & routed:
            manager = layer.expert_map_manager
            raise PlacementError(
                f"{layer.layer_name}: the checkpoint brought {weight} ({shard}) for {len(routed) - len(missing)} of {len(routed)} slots "
                f"of EP rank {manager.ep_rank}; slot {missing[0]} (expert {experts[missing[0]]}) was never filled: the checkpoint is "
                "incomplete, or a loader left the placement out of account; use a complete checkpoint with a tensor per expert"
            )


def filled_patches() -> list[Patch]:
    """The patch that watches the loader."""
    return [
        Patch(
            "filled-slots",
            "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.weight_loader",
            _weight_loader,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a slot that no weight was loaded into is served without a word",
            upstream="vLLM issue 55228",
            removable_when="vLLM checks that every slot was filled",
        )
    ]
