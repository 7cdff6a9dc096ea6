"""Count choices in a single Triton kernel; imported only where the counters lie on a GPU.

The number of ids is no constant of the kernel: Triton would compile it anew, while a server serves,
for the first batch whose size is divisible by 16, and for the first that is not.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_BLOCK = 256


# Without annotations, which Triton would take for types of its own.
@triton.jit(do_not_specialize=["numel"])
def _count(  # type: ignore[no-untyped-def]
    ids_ptr, start_ptr, counts_ptr, numel, top_k, experts, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    expert = tl.load(ids_ptr + at, mask=inside, other=0).to(tl.int64)
    counted = inside & (expert >= 0) & (expert < experts)
    place = tl.where(counted, expert, 0)
    if start_ptr is not None:
        place += tl.load(start_ptr + at // top_k, mask=inside, other=0)
    tl.atomic_add(
        counts_ptr + place, tl.full([BLOCK], 1, counts_ptr.dtype.element_ty), mask=counted
    )


def count(ids: Any, start: Any, counts: Any, num_experts: int) -> None:
    """Add one to ``counts[start[token] + id]`` for every id that is an expert.

    Args:
        ids: integers ``[tokens, top_k]``.
        start: int64 ``[tokens, 1]``, index of expert 0 in the token's row of ``counts``; None where
            all tokens have one row.
        counts: integers, flat and contiguous.
        num_experts: ids outside ``0..num_experts-1`` are left out.
    """
    numel = ids.numel()
    if numel:
        _count[(triton.cdiv(numel, _BLOCK),)](
            ids.contiguous(), start, counts, numel, ids.shape[1], num_experts, BLOCK=_BLOCK
        )
