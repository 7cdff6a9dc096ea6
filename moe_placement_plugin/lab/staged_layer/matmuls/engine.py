"""Hold what vLLM's and SGLang's Triton kernels have in common.

They take block-aligned rows and ``[rows * top_k]`` intermediates.
"""

from __future__ import annotations

import importlib
import inspect
import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ....core.errors import PlacementError
from ..results import RouteOutput
from ..weights import ExpertWeights, swiglu
from .align import align_blocks
from .base import Matmuls, sum_choices

INTERPRETER_TILES = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1}
"""Tiles under the interpreter, where the engines' own choice by device name means nothing."""


UNQUANTIZED = {
    "A_scale": None,
    "B_scale": None,
    "use_fp8_w8a8": False,
    "use_int8_w8a8": False,
    "use_int8_w8a16": False,
    "use_int4_w4a16": False,
    "per_channel_quant": False,
}
"""Arguments of both launchers for weights that are not quantized."""

LAUNCH = (
    *("A", "B", "C", "topk_weights", "sorted_token_ids", "expert_ids", "num_tokens_post_padded"),
    *("mul_routed_weight", "top_k", "config", "compute_type"),
    *UNQUANTIZED,
)
"""Arguments that both launchers are given."""


@dataclass(frozen=True, eq=False)
class AlignedPlan:
    """Hold the result of the align step, used by both matmuls.

    Attributes:
        sorted_ids: int32, see `align_blocks`; None when every choice is a block of its own (vLLM,
            tiny batches).
        expert_ids: int32 ``[blocks]``.
        num_padded: int32 ``[1]``.
        config: the kernel's tiles for the up projection.
        down_config: those for the down projection; the same ``BLOCK_SIZE_M``.
    """

    sorted_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    config: dict[str, Any]
    down_config: dict[str, Any]


class Product(NamedTuple):
    """Tell the up projection from the down projection when a kernel is launched.

    Attributes:
        config: the kernel's tiles.
        top_k: choices that share a row of what is multiplied.
        weighted: whether a row is multiplied by its router weight.
    """

    config: dict[str, Any]
    top_k: int
    weighted: bool


class EngineMatmuls(Matmuls):
    """Multiply by an engine's own kernel, launched by the engine's own launcher.

    Args:
        interpreted: whether Triton interprets its kernels on CPU (``TRITON_INTERPRET=1``).
    """

    zeroes_elsewhere: bool
    """Whether the kernel writes zeros for the choices of other ranks."""

    _launch: Callable[..., Any]
    """The engine's launcher, which takes `LAUNCH`."""

    def __init__(self, interpreted: bool):
        self.interpreted = interpreted

    @abstractmethod
    def choose_tiles(
        self, x: torch.Tensor, output: RouteOutput, weights: ExpertWeights
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choose tiles for the up and the down projection as the engine does."""

    @abstractmethod
    def align(
        self, output: RouteOutput, config: dict[str, Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Run the engine's own align step on CUDA."""

    def launch(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        output: RouteOutput,
        plan: AlignedPlan,
        product: Product,
    ) -> None:
        """Set ``c[i] = a[i // top_k] @ b[slot of choice i].T``, weighted by the router if asked."""
        self._launch(
            A=a,
            B=b,
            C=c,
            topk_weights=output.weights,
            sorted_token_ids=plan.sorted_ids,
            expert_ids=plan.expert_ids,
            num_tokens_post_padded=plan.num_padded,
            mul_routed_weight=product.weighted,
            top_k=product.top_k,
            config=product.config,
            compute_type=self._compute_types[c.dtype],
            **UNQUANTIZED,
            **self.more_arguments(output),
        )

    def more_arguments(self, output: RouteOutput) -> dict[str, Any]:
        """Return what the engine's launcher takes besides `LAUNCH`."""
        return {}

    @cached_property
    def _compute_types(self) -> dict[torch.dtype, Any]:
        import triton.language as tl  # lazy: heavy

        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

    @abstractmethod
    def engine_swiglu(self, values: torch.Tensor) -> torch.Tensor:
        """Run the engine's activation kernel on CUDA."""

    @abstractmethod
    def engine_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the choices of each row as the engine does on CUDA.

        Shapes: ``[rows, top_k, columns]`` to ``[rows, columns]``.
        """

    def plan(
        self, x: torch.Tensor, output: RouteOutput, weights: ExpertWeights
    ) -> AlignedPlan | None:
        """Align rows; None when there is nothing to multiply: no rows, or a rank without slots."""
        if not output.num_rows or not output.num_slots:
            return None
        if self.interpreted:
            if x.dtype == torch.bfloat16:
                raise PlacementError(
                    f"{x.dtype} under the Triton interpreter, whose bfloat16 products are wrong: "
                    "use float32"
                )
            config = down = INTERPRETER_TILES
            aligned = align_blocks(
                output.local_slots, config["BLOCK_SIZE_M"], output.num_slots, self.zeroes_elsewhere
            )
        else:
            config, down = self.choose_tiles(x, output, weights)
            aligned = self.align(output, config)
        return AlignedPlan(*aligned, config, down)

    def up(self, x, output, plan, w13):
        return self._product(x, output, plan, w13, x.dtype)

    def up_columns(self, x, output, plan, w13, sums):
        part = self._product(x, output, plan, w13, torch.float32)
        return part if sums is None else sums.add_(part)

    def _product(
        self,
        x: torch.Tensor,
        output: RouteOutput,
        plan: AlignedPlan | None,
        w13: torch.Tensor,
        dtype,
    ) -> torch.Tensor:
        top_k = output.local_slots.shape[1]
        if plan is None:
            return x.new_zeros((0, w13.shape[1]), dtype=dtype)
        result = x.new_empty((x.shape[0], top_k, w13.shape[1]), dtype=dtype)
        if plan.expert_ids.numel():
            product = Product(plan.config, top_k, weighted=False)
            self.launch(x, w13, result, output, plan, product)
        return result.view(-1, w13.shape[1])

    def activate(self, values, dtype):
        if self.interpreted or values.dtype != dtype or not values.numel():
            return swiglu(values).to(dtype)
        return self.engine_swiglu(values)

    def down(self, hidden, output, plan, w2):
        rows, columns = output.num_rows, w2.shape[1]
        if plan is None:
            return hidden.new_zeros((rows, columns))
        shape = (rows, output.local_slots.shape[1], columns)
        fills = output.complete or (self.zeroes_elsewhere and plan.expert_ids.numel())
        values = hidden.new_empty(shape) if fills else hidden.new_zeros(shape)
        if plan.expert_ids.numel():
            product = Product(plan.down_config, 1, weighted=True)
            self.launch(hidden, w2, values, output, plan, product)
        return sum_choices(values) if self.interpreted else self.engine_sum(values)


def check_mode(engine: str, device: torch.device) -> bool:
    """Return whether kernels are interpreted: on CPU they must be, on CUDA they must not.

    Raises:
        PlacementError: when device and environment do not fit.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and not interpreted:
        raise PlacementError(
            f"{engine}'s Triton kernels on a CPU: set TRITON_INTERPRET=1 before the process starts "
            "(they are then interpreted, slowly "
            "and not in bfloat16), or choose torch"
        )
    if device.type == "cuda" and interpreted:
        raise PlacementError("TRITON_INTERPRET=1 with a GPU: unset it before the process starts")
    if device.type not in ("cpu", "cuda"):
        raise PlacementError(f"{engine}'s Triton kernels on {device.type}: choose torch")
    return interpreted


def engine_function(module: str, name: str, passed: tuple[str, ...]) -> Callable:
    """Return a function of the installed engine that takes ``passed`` and needs no others.

    Raises:
        PlacementError: naming what differs.
    """
    where = f"{module}.{name}"
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PlacementError(
            f"{where} is not in the installed engine ({error}): use a supported version, or choose "
            "torch"
        ) from None
    return require_parameters(function, where, passed)


def require_parameters(function: Callable, where: str, passed: tuple[str, ...]) -> Callable:
    """Return ``function``, if it can be called with the parameters ``passed``.

    Raises:
        PlacementError: naming what differs.
    """
    parameters = inspect.signature(function).parameters
    lacking = [p for p in passed if p not in parameters]
    empty, variadic = (
        inspect.Parameter.empty,
        (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD),
    )
    wants = [
        n
        for n, p in parameters.items()
        if p.default is empty and p.kind not in variadic and n not in passed
    ]
    if lacking or wants:
        lacks = f"lacks {', '.join(lacking)}" if lacking else f"also needs {', '.join(wants)}"
        raise PlacementError(
            f"{where} differs from what this package was written for: it {lacks}; use a supported "
            "version (`moe-placement doctor` lists "
            "them), or choose torch"
        )
    return function
