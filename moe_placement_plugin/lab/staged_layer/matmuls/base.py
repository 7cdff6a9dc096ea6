"""Say what the stages ask of whoever multiplies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from ..collectives import add_in_order
from ..results import RouteOutput
from ..weights import ExpertWeights, swiglu


class Matmuls(ABC):
    """Multiply a rank's experts: the two grouped matmuls.

    Attributes:
        name: whose kernels these are, with version and whether they run under the Triton
            interpreter; reports print it.
    """

    name: str

    @abstractmethod
    def plan(self, x: torch.Tensor, output: RouteOutput, weights: ExpertWeights) -> Any:
        """Return the order of rows that both matmuls use.

        ``x [rows, columns]`` gives type and device.
        """

    @abstractmethod
    def up(
        self, x: torch.Tensor, output: RouteOutput, plan: Any, w13: torch.Tensor
    ) -> torch.Tensor:
        """Multiply ``[rows, hidden]`` to gate and up ``[rows of the plan, 2 * intermediate]``."""

    @abstractmethod
    def up_columns(
        self,
        x: torch.Tensor,
        output: RouteOutput,
        plan: Any,
        w13: torch.Tensor,
        sums: torch.Tensor | None,
    ) -> torch.Tensor:
        """Do the same for some columns of the embedding, added to ``sums``, in float32 or wider.

        Args:
            x: ``[rows, columns]``.
            output: from `route`.
            plan: from `plan`.
            w13: ``[slots, 2 * intermediate, columns]``.
            sums: of the columns before; may be changed in place.
        """

    def activate(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return SwiGLU of what `up` or `up_columns` returned, rounded to ``dtype``."""
        return swiglu(values).to(dtype)

    @abstractmethod
    def down(
        self, hidden: torch.Tensor, output: RouteOutput, plan: Any, w2: torch.Tensor
    ) -> torch.Tensor:
        """Multiply activated rows to ``[rows, columns]``, weighted, and sum the local choices.

        Args:
            hidden: from `activate`.
            output: from `route`.
            plan: from `plan`.
            w2: ``[slots, columns, intermediate]``.
        """


def sum_choices(values: torch.Tensor) -> torch.Tensor:
    """Sum ``[rows, top_k, columns]`` over the choices, in order."""
    return add_in_order(values.unbind(1))
