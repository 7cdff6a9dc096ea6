"""Gathering and scattering of unequal shares, which data-parallel ranks that share experts need and gloo does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


def gather(share: torch.Tensor, sizes: Sequence[int] | None, group: ProcessGroup, out: torch.Tensor | None = None) -> torch.Tensor:
    """All ranks' shares, one after another.

    Args:
        share: ``[sizes[rank], ...]``, of this rank.
        sizes: rows of each rank; None: all have as many.
        group: the ranks.
        out: ``[sum(sizes), ...]``, what they are written to.
    """
    import torch
    import torch.distributed as dist

    sizes = sizes or [share.shape[0]] * dist.get_world_size(group)
    padded = share.new_zeros((max(sizes), *share.shape[1:]))  # gloo gathers equal shapes only
    padded[: share.shape[0]] = share
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)], out=out)


def reduce_scatter(rows: torch.Tensor, sizes: Sequence[int] | None, group: ProcessGroup, out: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's share of the sum of all ranks' rows.

    Args:
        rows: ``[sum(sizes), ...]``.
        sizes: rows of each rank; None: all have as many.
        group: the ranks.
        out: ``[sizes[rank], ...]``, what it is written to.
    """
    import torch.distributed as dist

    summed = rows.clone()
    dist.all_reduce(summed, group=group)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = sizes or [summed.shape[0] // world] * world
    share = summed[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
    return share.clone() if out is None else out.copy_(share)
