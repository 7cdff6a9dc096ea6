"""Hold the weights of a MoE layer, as a rank holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...core.errors import PlacementError
from ...core.placement import Placement


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Hold the weights of the experts in a rank's slots, as the engines' kernels read them.

    They may also be those of all logical experts.

    Attributes:
        w13: ``[slots, 2 * intermediate, hidden]``, rows of the gate projection, then those of the
            up projection.
        w2: ``[slots, hidden, intermediate]``, the down projection.
    """

    w13: torch.Tensor
    w2: torch.Tensor

    def __post_init__(self) -> None:
        slots, double, hidden = self.w13.shape
        if self.w2.shape != (slots, hidden, double // 2) or double % 2:
            raise PlacementError(
                f"w13 {tuple(self.w13.shape)} and w2 {tuple(self.w2.shape)}: they must be [slots, "
                "2 * intermediate, hidden] and "
                "[slots, hidden, intermediate]"
            )

    @property
    def hidden_size(self) -> int:
        """Return the width of a token."""
        return self.w13.shape[2]

    def shard(self, placement: Placement, row: int, rank: int) -> ExpertWeights:
        """Return the weights of one rank's slots, from those of all logical experts.

        Args:
            placement: where the experts lie.
            row: the placement's row of this layer.
            rank: the EP rank.
        """
        local = torch.from_numpy(placement.local_experts(row, rank).astype("int64")).to(
            self.w13.device
        )
        return ExpertWeights(self.w13[local], self.w2[local])


@dataclass(frozen=True, eq=False)
class SharedExperts:
    """Compute experts that see every token, each rank for its own tokens.

    They are never exchanged.

    Attributes:
        w13: ``[2 * intermediate, hidden]``, gate, then up (several shared experts are one of their
            summed width).
        w2: ``[hidden, intermediate]``.
        gate: ``[1, hidden]`` for models that scale the result by a sigmoid of it (Qwen2-MoE), or
            None.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    gate: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[tokens, hidden]`` to the same shape and dtype."""
        result = swiglu(x @ self.w13.T) @ self.w2.T
        return result if self.gate is None else torch.sigmoid(x @ self.gate.T) * result


def swiglu(values: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of ``[..., 2 * intermediate]`` (gate, then up)."""
    gate, up = values.chunk(2, dim=-1)
    return F.silu(gate) * up
