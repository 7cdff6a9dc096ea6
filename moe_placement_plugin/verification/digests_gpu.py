"""Compute digests on a GPU: one Triton kernel, one pass over the bytes.

Nothing is copied to the host but the digests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .definition import BLOCK, KEYS

_WORDS = tl.constexpr(BLOCK)
_LANES = tl.constexpr(1024)
"""Words that a program reads at a time."""

_ROWS = tl.constexpr(16)
"""Blocks of `BLOCK` words for one program."""


# Without annotations, which Triton would take for types of its own.
@triton.jit
def _blocks(words, keys, parts, size, stride, num_parts):  # type: ignore[no-untyped-def]
    """Write the digest of ``_ROWS`` blocks of one slot into ``parts [slots, num_parts]``."""
    slot = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    lane = tl.arange(0, _LANES)
    total = tl.zeros([_LANES], dtype=tl.uint64)
    for row in range(_ROWS):
        block = part * _ROWS + row
        mixed = block.to(tl.uint64) + 0x100000000 + 0x9E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
        factor = (mixed ^ (mixed >> 31)) | 1
        inner = tl.zeros([_LANES], dtype=tl.uint64)
        for column in tl.static_range(0, _WORDS, _LANES):
            at = block.to(tl.int64) * _WORDS + column + lane
            word = tl.load(words + slot * stride + at, mask=at < size, other=0)
            key = tl.load(keys + column + lane)
            inner += (word.to(tl.uint32, bitcast=True).to(tl.uint64)) * (
                key.to(tl.uint32, bitcast=True).to(tl.uint64)
            )
        total += inner * factor
    tl.store(parts + slot * num_parts + part, tl.sum(total.to(tl.int64, bitcast=True), axis=0))


def digests(data: torch.Tensor) -> torch.Tensor:
    """Compute the digest of every slot.

    Args:
        data: uint8 ``[slots, bytes per slot]``, contiguous, on a GPU.

    Returns:
        int64 ``[slots]`` on the same device: the bits of `definition.reference` for each row.
    """
    slots, size = data.shape
    if size % 4 or data.data_ptr() % 4:
        padded = data.new_zeros((slots, -(-size // 4) * 4))
        padded[:, :size] = data
        data = padded
    words = data.view(torch.int32)
    # Uploaded for each call: what stays on the device is discarded while an engine sleeps (vLLM's
    # level 2), and with keys of zeros all weights would have the same digest.
    keys = torch.from_numpy(KEYS.view("int32").copy()).to(data.device)
    num_parts = -(-words.shape[1] // (BLOCK * _ROWS.value))
    parts = torch.zeros((slots, num_parts), dtype=torch.int64, device=data.device)
    if words.numel():
        _blocks[(num_parts, slots)](words, keys, parts, words.shape[1], words.stride(0), num_parts)
    return parts.sum(1)
