"""Do over gloo what engines ask of NCCL and gloo does not have.

That is to gather and scatter unequal shares, for data-parallel ranks that share experts, and to
send a GPU's memory to another rank, for experts that move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import P2POp, ProcessGroup, Work


def gather(
    share: torch.Tensor | list[torch.Tensor],
    sizes: Sequence[int] | None,
    group: ProcessGroup,
    out: torch.Tensor | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Gather all ranks' shares, one after another.

    Args:
        share: ``[sizes[rank], ...]``, of this rank; or a list of such, each gathered by itself.
        sizes: rows of each rank; None: all have as many.
        group: the ranks.
        out: ``[sum(sizes), ...]``, what they are written to.
    """
    import torch
    import torch.distributed as dist

    if isinstance(share, list):
        return [gather(one, sizes, group) for one in share]
    sizes = sizes or [share.shape[0]] * dist.get_world_size(group)
    padded = share.new_zeros((max(sizes), *share.shape[1:]))  # gloo gathers equal shapes only
    padded[: share.shape[0]] = share
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes)], out=out)


def reduce_scatter(
    rows: torch.Tensor,
    sizes: Sequence[int] | None,
    group: ProcessGroup,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this rank's share of the sum of all ranks' rows.

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


class Transfer:
    """Send or receive by way of the host's memory.

    As NCCL's it can be waited for again, which gloo never comes back from.

    Args:
        work: gloo's.
        host: what gloo sends, or receives into.
        into: where what was received belongs; None for a send.
    """

    def __init__(self, work: Work, host: torch.Tensor, into: torch.Tensor | None):
        self._work, self._host, self._into = work, host, into

    def wait(self, *timeout) -> bool:
        """Wait until it is done, and what was received lies where it belongs."""
        if self._work is not None:
            self._work.wait(*timeout)
            self._work = None
            if self._into is not None:
                self._into.copy_(self._host)
        return True


def exchange(operations: Sequence[P2POp]) -> list[Transfer]:
    """Run `torch.distributed.batch_isend_irecv` for a GPU's memory, which gloo cannot send."""
    import torch.distributed as dist

    transfers = []
    for one in operations:
        host = one.tensor.to("cpu", copy=True)
        work = one.op(host, one.peer, one.group, one.tag)
        transfers.append(Transfer(work, host, one.tensor if one.op is dist.irecv else None))
    return transfers
