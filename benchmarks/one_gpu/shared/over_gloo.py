"""What engines ask of NCCL and gloo does not have: gathering and scattering of unequal shares, for data-parallel ranks that share experts, and
sending a GPU's memory to another rank, for experts that move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.distributed import P2POp, ProcessGroup, Work


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


class Transfer:
    """One send, or one receive into a GPU's memory by way of the host's; as NCCL's it can be waited for again, which gloo never comes back from.

    Args:
        work: gloo's.
        tensor: received into; None for a send.
        host: what gloo receives into.
    """

    def __init__(self, work: Work, tensor: torch.Tensor | None = None, host: torch.Tensor | None = None):
        self._work, self._tensor, self._host = work, tensor, host

    def wait(self, *timeout) -> bool:
        """It is done, and what was received lies where it belongs."""
        if self._work is not None:
            self._work.wait(*timeout)
            self._work = None
            if self._tensor is not None:
                self._tensor.copy_(self._host)
        return True


def exchange(operations: Sequence[P2POp], device: str = "cuda") -> list[Work | Transfer]:
    """`torch.distributed.batch_isend_irecv` for tensors of a GPU too.

    Args:
        operations: sends and receives.
        device: type of device whose memory gloo cannot send.
    """
    import torch.distributed as dist

    works: list[Work | Transfer] = []
    for one in operations:
        by_host, received = one.tensor.device.type == device, one.op is dist.irecv
        host = one.tensor.to("cpu", copy=True) if by_host else one.tensor
        work = one.op(host, one.peer, one.group, one.tag)
        works.append(Transfer(work, one.tensor if received else None, host) if by_host else work)
    return works
