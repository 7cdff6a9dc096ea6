"""Describe quantized checkpoints, of Qwen3-MoE and gpt-oss.

The tensors of the experts are as the loader gets them.

They are compared as they lie after loading: what SGLang makes of them afterwards
(`process_weights_after_loading`) needs kernels that a CPU without AMX has not, and works within a
slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.zoo.checkpoint import finite_float8, seeded

from .others import GPT_OSS
from .recipe import ALL, BASE, MLP, QWEN3, Recipe, Tensors, router
from .values import EXPERTS, HIDDEN, WIDTH

PROJECTIONS = {"gate_proj": "w13", "up_proj": "w13", "down_proj": "w2"}


@dataclass(frozen=True)
class Tensor:
    """Describe one tensor of each of an expert's projections.

    Attributes:
        suffix: how the checkpoint names it after the projection.
        parameter: SGLang's name after ``w13_`` or ``w2_``.
        dtype: numpy's; ``uint8`` for 8-bit floats.
        rows: values of dimension 0 for each row of the matrix (a fraction: one for several rows); 0
            for a scalar.
        columns: the same of dimension 1.
        same: whether gate and up have the same, which the engine keeps once.
    """

    suffix: str
    parameter: str
    dtype: str
    rows: float
    columns: float
    same: bool = False

    def of(self, layer: int, expert: int, projection: str) -> np.ndarray:
        """Return the values, the same whenever asked."""
        shape = (HIDDEN, WIDTH) if projection == "down_proj" else (WIDTH, HIDDEN)
        size = (
            tuple(
                max(1, round(n * f)) for n, f in zip(shape, (self.rows, self.columns), strict=True)
            )
            if self.rows
            else ()
        )
        told = PROJECTIONS[projection] if self.same else projection
        rng = seeded(f"{self.suffix} {layer} {expert} {told}")
        if self.dtype == "uint8":
            return finite_float8(rng, size)
        if self.dtype == "float32":
            return np.asarray(rng.uniform(0.5, 1.5, size), dtype=np.float32)
        low, high = {"int8": (1, 127), "int32": (1, 2**31 - 1)}[self.dtype]
        return rng.integers(low, high, size).astype(self.dtype)


@dataclass(frozen=True)
class QuantizedRecipe(Recipe):
    """Describe a checkpoint whose experts consist of these tensors."""

    own: tuple[Tensor, ...] = ()

    def tensors(self) -> Tensors:
        found = super().tensors()
        for layer in self.moe:
            block = f"{self.block.format(layer=layer)}.experts"
            for e in range(EXPERTS):
                for projection in PROJECTIONS:
                    for tensor in self.own:
                        found[f"{block}.{e}.{projection}.{tensor.suffix}"] = tensor.of(
                            layer, e, projection
                        )
        return found

    def slot(self, layer: int, number: int) -> dict[str, np.ndarray]:
        found: dict[str, list[np.ndarray]] = {}
        for tensor in self.own:
            for projection, parameter in PROJECTIONS.items():
                if not (tensor.same and projection == "up_proj"):
                    values = tensor.of(layer, number, projection)
                    found.setdefault(f"{parameter}_{tensor.parameter}", []).append(values.ravel())
        return {parameter: np.concatenate(values) for parameter, values in found.items()}


def _recipe(
    variant: str, config: dict[str, Any], *own: Tensor, unbuildable: str = ""
) -> QuantizedRecipe:
    return QuantizedRecipe(
        "Qwen3MoeForCausalLM",
        BASE | QWEN3 | {"model_type": "qwen3_moe", "head_dim": 32, "quantization_config": config},
        ALL,
        MLP,
        (router(),),
        variant=variant,
        raw=True,
        engine={"dtype": "bfloat16"},
        own=own,
        unbuildable=unbuildable,
    )


def _compressed(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        **more,
    }
    return {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head", "re:.*gate$"],
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
    }


_MXFP4 = {
    "gate_up_proj_blocks": ("w13_weight", (2 * WIDTH, HIDDEN // 32, 16)),
    "gate_up_proj_scales": ("w13_weight_scale", (2 * WIDTH, HIDDEN // 32)),
    "gate_up_proj_bias": ("w13_weight_bias", (2 * WIDTH,)),
    "down_proj_blocks": ("w2_weight", (HIDDEN, WIDTH // 32, 16)),
    "down_proj_scales": ("w2_weight_scale", (HIDDEN, WIDTH // 32)),
    "down_proj_bias": ("w2_weight_bias", (HIDDEN,)),
}
"""Tensor of all experts in gpt-oss's MXFP4 checkpoints -> parameter, shape of one's part."""

_SCALE_ONE = 127
"""A scale of 1, an exponent of two with a bias."""


@dataclass(frozen=True)
class Mxfp4Recipe(Recipe):
    """Describe gpt-oss's own checkpoint.

    Two 4-bit numbers in a byte, a scale for 32 of them, biases as they are.
    """

    def tensors(self) -> Tensors:
        found = super().tensors()
        for layer in self.moe:
            for name in _MXFP4:
                parts = [self._part(name, layer, e) for e in range(EXPERTS)]
                found[f"{self.block.format(layer=layer)}.experts.{name}"] = np.stack(parts)
        return found

    def padding(self, parameter: str) -> int:
        return _SCALE_ONE if parameter.endswith("scale") else 0

    def slot(self, layer: int, number: int) -> dict[str, np.ndarray]:
        return {
            parameter: self._part(name, layer, number).ravel()
            for name, (parameter, _) in _MXFP4.items()
        }

    @staticmethod
    def _part(name: str, layer: int, expert: int) -> np.ndarray:
        shape, rng = _MXFP4[name][1], seeded(f"{name} {layer} {expert}")
        if name.endswith("bias"):
            return rng.standard_normal(shape).astype(np.float32)
        return rng.integers(1, _SCALE_ONE if name.endswith("scales") else 256, shape).astype(
            np.uint8
        )


_FP8 = Tensor("weight", "weight", "uint8", 1, 1)
QUANTIZED: tuple[Recipe, ...] = (
    _recipe(
        "fp8-block",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        _FP8,
        Tensor("weight_scale_inv", "weight_scale_inv", "float32", 1 / 32, 1 / 32),
    ),
    _recipe(
        "fp8-per-tensor",
        {"quant_method": "fp8", "activation_scheme": "static"},
        _FP8,
        Tensor("weight_scale", "weight_scale", "float32", 0, 0),
        Tensor("input_scale", "input_scale", "float32", 0, 0, same=True),
    ),
    _recipe(
        "int8",
        {"quant_method": "w8a8_int8"},
        Tensor("weight", "weight", "int8", 1, 1),
        Tensor("weight_scale", "weight_scale", "float32", 1, 1 / HIDDEN),
    ),
    _recipe(
        "int4-packed",
        _compressed("int", 4, "group", group_size=32, actorder=None),
        Tensor("weight_packed", "weight_packed", "int32", 1, 1 / 8),
        Tensor("weight_scale", "weight_scale", "float32", 1, 1 / 32),
        unbuildable="Torch not compiled with CUDA enabled",
    ),
    Mxfp4Recipe(
        "GptOssForCausalLM",
        GPT_OSS | {"quantization_config": {"quant_method": "mxfp4"}},
        ALL,
        MLP,
        (router("router.weight", "router.bias"),),
        variant="mxfp4",
        raw=True,
        packed=True,
        engine={"attention_backend": "triton", "dtype": "bfloat16", "moe_runner_backend": "triton"},
    ),
)
