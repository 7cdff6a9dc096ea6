"""Make what a checkpoint has besides its MoE layers.

Read off a model that one rank has built, under the names that its loader splits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .recipe import Recipe, Tensors
from .values import drawn

Named = tuple[str, tuple[int, ...]]


def outline(model: Any) -> list[Named]:
    """Name and shape of every tensor that is not of an MoE block.

    Args:
        model: as SGLang builds it on one rank.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    blocks = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if any(isinstance(c, FusedMoE) for c in module.children())
    )
    found: list[Named] = []
    for name, module in model.named_modules():
        if not f"{name}.".startswith(blocks):
            for part, parameter in module.named_parameters(recurse=False):
                found += _split(name, part, module, tuple(parameter.shape))
    return found


def _split(name: str, part: str, module: Any, shape: tuple[int, ...]) -> Iterator[Named]:
    """Yield the checkpoint's tensors of a parameter, which joins several for some layers."""
    last = name.rpartition(".")[2]
    if last == "qkv_proj":
        heads, kv = module.total_num_heads, module.total_num_kv_heads
        value = getattr(module, "v_head_size", module.head_size)
        parts = {
            "q_proj": heads * module.head_size,
            "k_proj": kv * module.head_size,
            "v_proj": kv * value,
        }
    elif last == "gate_up_proj":
        parts = {"gate_proj": shape[0] // 2, "up_proj": shape[0] // 2}
    elif last == "fused_qkv_a_proj_with_mqa":
        own = module.output_size if hasattr(module, "output_size") else shape[0]
        parts = {
            "q_a_proj": own - 40,
            "kv_a_proj_with_mqa": 40,
        }  # of `recipe.MLA`: kv_lora_rank + qk_rope_head_dim
    else:
        parts = {last: shape[0] if shape else 0}
    for piece, rows in parts.items():
        yield f"{name[: -len(last)]}{piece}.{part}", (rows, *shape[1:])


def whole(recipe: Recipe, outlined: list[Named]) -> Tensors:
    """Draw all tensors of a checkpoint: norms are 1, other vectors small, matrices random."""
    found: Tensors = {}
    for name, shape in outlined:
        if len(shape) < 2:
            found[name] = (
                np.ones(shape, np.float32) if "norm" in name else drawn(name, *shape, gain=0.1)
            )
        else:
            found[name] = drawn(name, *shape, gain=8.0 if "embed" in name else 1.5)
    return found | recipe.tensors()
