"""Tell rows apart by their contents: proof of whose rows came by position."""

from __future__ import annotations

from typing import Any

Signature = Any
"""int64 ``[slots, 2]`` on the host: of each slot the sum of its elements' bits and the sum of their
squares, whatever their order.
"""


def signature(rows: Any) -> Signature:
    """Return what tells the contents of rows apart.

    It does so in whatever order, shape and padding with zeros a loader stores them.

    Args:
        rows: a tensor ``[rows, ...]``.

    Returns:
        int64 ``[rows, 2]`` on the host; parts of a row add up to the row's.
    """
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = torch.zeros((rows.shape[0], 2), dtype=torch.int64, device="cpu")
    for row in range(rows.shape[0]):
        # Chunked, since int64 takes up to eight times the memory of a row.
        bits = rows[row].detach().contiguous().view(-1).view(integers[rows.element_size()])
        for chunk in bits.split(1 << 22):
            wide = chunk.to(torch.int64)
            found[row, 0] += wide.sum().cpu()
            found[row, 1] += (wide * wide).sum().cpu()
    return found
