"""The digest on a GPU: one Triton kernel, one pass over the bytes, nothing copied to the host but the digests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .definition import BLOCK, KEYS

_LANES = 1024
_ROWS = 16  # blocks of `BLOCK` words for one program


@triton.jit
def _blocks(
    words, keys, parts, size, stride, num_parts,
    BLOCK: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], dtype=tl.uint64)
    for row in range(ROWS):
        block = part * ROWS + row
        mixed = block.to(tl.uint64) + 0x100000000 + 0x9E3779B97F4A7C15
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
        factor = (mixed ^ (mixed >> 31)) | 1
        inner = tl.zeros([LANES], dtype=tl.uint64)
        for column in tl.static_range(0, BLOCK, LANES):
            at = block.to(tl.int64) * BLOCK + column + lane
            word = tl.load(words + slot * stride + at, mask=at < size, other=0)
            key = tl.load(keys + column + lane)
            inner += (word.to(tl.uint32, bitcast=True).to(tl.uint64)) * (
                key.to(tl.uint32, bitcast=True).to(tl.uint64)
            )
        total += inner * factor
    tl.store(parts + slot * num_parts + part, tl.sum(total.to(tl.int64, bitcast=True), axis=0))


def digests(data: torch.Tensor) -> torch.Tensor:
    """Digests of every slot.

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
    num_parts = -(-words.shape[1] // (BLOCK * _ROWS))
    parts = torch.zeros((slots, num_parts), dtype=torch.int64, device=data.device)
    if words.numel():
        _blocks[(num_parts, slots)](
            words, keys, parts, words.shape[1], words.stride(0), num_parts,
            BLOCK=BLOCK, LANES=_LANES, ROWS=_ROWS,
        )  # fmt: skip
    return parts.sum(1)
