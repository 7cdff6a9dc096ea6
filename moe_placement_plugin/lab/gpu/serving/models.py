"""Describe the models that are served: their shapes, and the load that their routers shall have."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from .... import ExpertLoad, PlacementError
from ...demo.tiny_models import Size, glm4_moe_config, qwen3_moe_config
from ...staged_layer import Routing


@dataclass(frozen=True)
class Model:
    """Describe a model's shape.

    Attributes:
        size: widths and number of layers; for grouped models layer 0 is dense.
        experts: routed experts per layer.
        top_k: experts per token.
        groups: expert groups, half of which a token may use; 0 for a model without.
    """

    size: Size
    experts: int
    top_k: int
    groups: int = 0

    @property
    def moe_layers(self) -> range:
        """Return the ids of the MoE layers."""
        return range(1 if self.groups else 0, self.size.layers)

    def cut(self, layers: int | None) -> Model:
        """Return the same model with fewer layers.

        Raises:
            PlacementError: when it has no MoE layer then.
        """
        if layers is None:
            return self
        made = replace(self, size=replace(self.size, layers=layers))
        if not made.moe_layers:
            raise PlacementError(
                f"--layers {layers}: no MoE layer is left; give at least "
                f"{self.moe_layers.start + 1}"
            )
        return made

    def cache_bytes(self, tokens: int, ranks: int, itemsize: int) -> int:
        """Return the bytes of ``tokens`` tokens' keys and values on each of ``ranks`` GPUs.

        With data-parallel attention a rank has a share of the tokens and all heads of each: as many
        bytes, while heads divide.
        """
        return (
            tokens
            * self.size.layers
            * 2
            * max(1, self.size.kv_heads // ranks)
            * self.size.head_dim
            * itemsize
        )

    def routing(self, device: str = "cpu") -> Routing:
        """Return the model's rule, without a correction bias: the gate has one."""
        if self.groups:
            zero = torch.zeros(self.experts, device=device)
            return Routing(
                self.experts,
                self.top_k,
                "sigmoid",
                True,
                self.groups,
                self.groups // 2,
                correction_bias=zero,
            )
        return Routing(self.experts, self.top_k)

    def config(self) -> dict:
        """Return config.json."""
        if self.groups:
            return glm4_moe_config(self.size, self.experts, self.groups, self.top_k)
        return qwen3_moe_config(self.size, self.experts, self.top_k)


MODELS = {
    # DeepSeek-V2-Lite's MoE layer with eight groups of experts, in GLM-4-MoE's architecture, which
    # both engines serve with any attention kernel.
    "v2-lite": Model(Size(2048, 1408, 16, 16, 4, 128, 8192), 64, 6, 8),
    "qwen3-30b-a3b": Model(Size(2048, 768, 16, 32, 4, 128, 8192), 128, 8),
    "tiny-grouped": Model(Size(64, 64, 3, 4, 2, 32, 512), 32, 4, 4),
    "tiny": Model(Size(64, 64, 3, 4, 2, 32, 512), 32, 4),
}
"""``tiny`` ones are for machines without a GPU."""


def wanted_shares(load: ExpertLoad | None, model: Model) -> np.ndarray:
    """Return the share of the choices that each expert shall get, float64.

    Shape: ``[MoE layers, experts]``, from layers and experts of a recorded load in order.

    No expert gets more than nine tenths of what one can: a token chooses it once. None for an even
    load.

    Raises:
        PlacementError: when the load has fewer layers or experts than the model.
    """
    layers = len(model.moe_layers)
    if load is None:
        return np.full((layers, model.experts), 1 / model.experts)
    load = load.moe_layers()
    if load.num_layers < layers or load.num_experts < model.experts:
        raise PlacementError(
            f"a load of {load.num_layers} layers x {load.num_experts} experts for {layers} x "
            f"{model.experts}: record a model at least as large"
        )
    rows = np.linspace(0, load.num_layers - 1, layers).astype(int)
    shares = load.total[rows, : model.experts] + 1.0
    for _ in range(20):
        shares = np.minimum(shares / shares.sum(axis=1, keepdims=True), 0.9 / model.top_k)
    return shares / shares.sum(axis=1, keepdims=True)
