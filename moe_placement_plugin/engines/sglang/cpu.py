"""Teach experts that know no slots of other ranks to leave them out.

These are the experts of SGLang's CPU engine under expert parallelism, and those of
``--enable-torch-compile``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .hook_registry import Hook


def skip_remote_slots(
    original: Callable, layer: Any, x: Any, topk_output: Any, moe_runner_config: Any
) -> Any:
    """Run `moe_forward_native` over the tokens that have a local slot.

    Its count of tokens per expert does not know -1, the mark of a slot on another rank. Tokens
    without a local slot are left out. The others come with as many slots as the busiest token has,
    their own first, then local slots that they do not use, with weight 0: the original counts each
    id of a row once.
    """
    if not bool((topk_output.topk_ids < 0).any()):
        return original(layer, x, topk_output, moe_runner_config)
    result = x.new_zeros(x.shape)
    rows, ids, weights = local_slots(
        topk_output.topk_ids, topk_output.topk_weights, layer.num_local_experts
    )
    if rows.numel():
        local = topk_output._replace(topk_ids=ids, topk_weights=weights)
        result[rows] = original(layer, x[rows], local, moe_runner_config)
    return result


def weigh_remote_slots_nothing(original: Callable, layer: Any, dispatch_output: Any) -> Any:
    """Run `fused_moe_forward_native` with weight 0 for slots of other ranks.

    By itself it takes -1 for this rank's last slot. It is what torch.compile makes of a single
    token's experts.
    """
    output = dispatch_output.topk_output
    here = output.topk_ids >= 0
    local = output._replace(
        topk_ids=output.topk_ids.clamp_min(0), topk_weights=output.topk_weights * here
    )
    return original(layer, dispatch_output._replace(topk_output=local))


def local_slots(topk_ids: Any, topk_weights: Any, num_local: int) -> tuple[Any, Any, Any]:
    """Return the tokens that use a local slot, and their slots without repetition or -1.

    Args:
        topk_ids: ``[tokens, top k]``, local slots, -1 for slots of other ranks.
        topk_weights: ``[tokens, top k]``.
        num_local: local slots.

    Returns:
        Token indices ``[n]``, slots ``[n, k]`` and weights ``[n, k]``, k being the most local slots
        that a token uses. A token with fewer gets further slots with weight 0, all different.
    """
    import torch

    here = topk_ids >= 0
    rows = here.any(dim=1).nonzero()[:, 0]
    here, ids, weights = here[rows], topk_ids[rows], topk_weights[rows]
    width = int(here.sum(dim=1).max()) if rows.numel() else 0
    # Weight per slot of every token; used slots first, then unused ones, which weigh nothing.
    used = torch.zeros((rows.numel(), num_local), dtype=torch.int8, device=ids.device)
    used.scatter_add_(1, ids.clamp(min=0).long(), here.to(torch.int8))
    weight = torch.zeros((rows.numel(), num_local), dtype=weights.dtype, device=ids.device)
    weight.scatter_add_(1, ids.clamp(min=0).long(), weights.masked_fill(~here, 0))
    slots = used.argsort(dim=1, descending=True, stable=True)[:, :width]
    return rows, slots.to(topk_ids.dtype), weight.gather(1, slots)


def cpu_hooks() -> list[Hook]:
    """Return the hooks round experts that know no slots of other ranks."""
    return [
        Hook(
            name="cpu-expert-parallelism",
            target="sglang.srt.layers.moe.fused_moe_native:moe_forward_native",
            hook=skip_remote_slots,
            relies_on=("layer", "x", "topk_output", "moe_runner_config"),
            why="the CPU engine's experts do not know slots of other ranks",
            removable_when="moe_forward_native handles -1",
        ),
        Hook(
            name="compiled-expert-parallelism",
            target="sglang.srt.layers.moe.fused_moe_native:fused_moe_forward_native",
            hook=weigh_remote_slots_nothing,
            relies_on=("layer", "dispatch_output"),
            counted=False,
            why="--enable-torch-compile with expert parallelism adds a slot of this rank for "
            "every choice that lies elsewhere: wrong output",
            removable_when="fused_moe_forward_native heeds -1",
        ),
    ]
