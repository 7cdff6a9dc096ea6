"""Counting choices in a single Triton kernel; imported only where the counters lie on a GPU.

The number of ids is no constant of the kernels: Triton would compile them anew, while a server serves, for the first batch whose size is
divisible by 16, and for the first that is not.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_BLOCK = 256


@triton.jit(do_not_specialize=["numel"])
def _count(ids_ptr, start_ptr, counts_ptr, numel, top_k, experts, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    expert = tl.load(ids_ptr + at, mask=inside, other=0).to(tl.int64)
    start = tl.load(start_ptr + at // top_k, mask=inside, other=0)
    counted = inside & (expert >= 0) & (expert < experts)
    tl.atomic_add(counts_ptr + start + tl.where(counted, expert, 0), tl.full([BLOCK], 1, tl.int64), mask=counted)


@triton.jit(do_not_specialize=["numel"])
def _count_slots(ids_ptr, counts_ptr, numel, slots, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(ids_ptr + at, mask=at < numel, other=-1).to(tl.int64)
    counted = (slot >= 0) & (slot < slots)
    tl.atomic_add(counts_ptr + tl.where(counted, slot, 0), tl.full([BLOCK], 1, counts_ptr.dtype.element_ty), mask=counted)


def count(ids: Any, start: Any, counts: Any, num_experts: int) -> None:
    """Add one to ``counts[start[token] + id]`` for every id that is an expert.

    Args:
        ids: integers ``[tokens, top_k]``.
        start: int64 ``[tokens, 1]``, index of expert 0 in the token's row of ``counts``.
        counts: int64, flat.
        num_experts: ids outside ``0..num_experts-1`` are left out.
    """
    numel = ids.numel()
    if numel:
        _count[(triton.cdiv(numel, _BLOCK),)](ids.contiguous(), start, counts, numel, ids.shape[1], num_experts, BLOCK=_BLOCK)


def count_slots(ids: Any, counts: Any) -> None:
    """Add one to ``counts[id]`` for every id that is a slot.

    Args:
        ids: integers of any shape; those outside ``0..slots-1`` are left out.
        counts: integers ``[slots]``, contiguous.
    """
    numel = ids.numel()
    if numel:
        _count_slots[(triton.cdiv(numel, _BLOCK),)](ids.contiguous(), counts, numel, counts.numel(), BLOCK=_BLOCK)
