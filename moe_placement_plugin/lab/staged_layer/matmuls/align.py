"""Do the engines' align step in torch, for CPU.

Rows are sorted by expert, each expert's padded to whole blocks.

On CUDA the engines' own kernels do this. Their CPU builds have none, and the Triton interpreter
needs the same three tensors.
"""

from __future__ import annotations

import torch


def align_blocks(
    slots: torch.Tensor, block_size: int, num_slots: int, keep_elsewhere: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what ``moe_align_block_size`` of vLLM and SGLang does. Waits for the device.

    Args:
        slots: int ``[rows, top_k]``, local slot of each choice, -1 elsewhere.
        block_size: rows of a block.
        num_slots: local slots.
        keep_elsewhere: give choices of other ranks blocks of their own, first and with expert -1
            (SGLang, whose kernel writes zeros for them), or leave them out (vLLM with
            ``ignore_invalid_experts``).

    Returns:
        ``sorted_token_ids`` int32 ``[blocks * block_size]``: indices into ``slots.flatten()``, its
        length as padding; ``expert_ids`` int32 ``[blocks]``; ``num_tokens_post_padded`` int32
        ``[1]``, the length of the first.
    """
    flat = slots.flatten().long()
    padding = flat.numel()
    first = -1 if keep_elsewhere else 0
    order = flat.argsort(stable=True)
    order = order[flat[order] >= first]
    sizes = torch.bincount(flat[order] - first, minlength=num_slots - first)
    blocks = (sizes + block_size - 1) // block_size
    experts = torch.repeat_interleave(torch.arange(first, num_slots, device=flat.device), blocks)
    ids = torch.full(
        (int(blocks.sum()) * block_size,), padding, dtype=torch.int32, device=flat.device
    )
    group = flat[order] - first
    start_sorted = sizes.cumsum(0) - sizes
    start_padded = (blocks.cumsum(0) - blocks) * block_size
    ids[
        torch.arange(order.numel(), device=flat.device) - start_sorted[group] + start_padded[group]
    ] = order.int()
    return ids, experts.int(), torch.tensor([ids.numel()], dtype=torch.int32, device=flat.device)
