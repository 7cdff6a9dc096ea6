"""Have all loaders of vLLM fill redundant experts too, which EPLB needs.

What nothing was loaded into is served all the same.
"""

from __future__ import annotations

from typing import Any

from ..common.patching import Patch
from .layers import routed_layers

_LAYER = "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts"


def _make_expert_params_mapping(original):
    def make_expert_params_mapping(
        model,
        ckpt_gate_proj_name,
        ckpt_down_proj_name,
        ckpt_up_proj_name,
        num_experts,
        num_redundant_experts=0,
        *args,
        **kwargs,
    ):
        # The loop over this mapping goes on where a slot is not here, so that rows of other ranks
        # do no harm. A draft model may have no such slots.
        num_redundant_experts = num_redundant_experts or max(
            map(_redundant, routed_layers(model).values()), default=0
        )
        names = (ckpt_gate_proj_name, ckpt_down_proj_name, ckpt_up_proj_name)
        return original(model, *names, num_experts, num_redundant_experts, *args, **kwargs)

    return make_expert_params_mapping


def _load_weights(original):
    def load_weights(self, weights):
        if redundant := _redundant(self):
            weights = (
                (
                    name,
                    with_replicas(
                        self, name, tensor, self.moe_config.num_logical_experts, redundant
                    ),
                )
                for name, tensor in weights
            )
        return original(self, weights)

    return load_weights


def _redundant(layer: Any) -> int:
    """Return the number of redundant experts of a ``RoutedExperts``."""
    return layer.moe_config.num_experts - layer.moe_config.num_logical_experts


def with_replicas(layer: Any, name: str, tensor: Any, experts: int, redundant: int) -> Any:
    """Return a tensor of all experts with rows for the redundant ones, as vLLM's first table.

    Args:
        layer: a ``RoutedExperts``.
        name: of the tensor, within the layer.
        tensor: a checkpoint's; one expert's own is returned as it is.
        experts: logical ones.
        redundant: redundant ones.
    """
    import torch

    qualified = f"{layer.layer_name}.{name}".partition("experts.")[2].partition(".")[0]
    if tensor.dim() != 3 or qualified.isdecimal() or tensor.shape[0] != experts:
        return tensor
    return torch.cat([tensor, tensor[torch.arange(redundant) % experts]])


def weight_patches() -> list[Patch]:
    """Return the patches of a server with redundant experts."""
    return [
        Patch(
            "replica-mapping",
            f"{_LAYER}.make_expert_params_mapping",
            _make_expert_params_mapping,
            relies_on=(
                "ckpt_gate_proj_name",
                "ckpt_down_proj_name",
                "ckpt_up_proj_name",
                "num_experts",
                "num_redundant_experts",
            ),
            why="some models (GLM-4-MoE in vLLM 0.25, MTP heads) name no redundant experts to "
            "their loader, whose slots stay empty: wrong output",
            upstream="vLLM issue 55228",
            removable_when="no model asks for a mapping without its redundant experts",
        ),
        Patch(
            "fused-replicas",
            f"{_LAYER}.load_weights",
            _load_weights,
            relies_on=("weights",),
            why="a checkpoint with all experts in one tensor leaves redundant slots without "
            "weights: wrong output",
            upstream="vLLM issue 55228",
            removable_when="RoutedExperts.load_weights fills redundant experts of fused "
            "checkpoints",
        ),
    ]
