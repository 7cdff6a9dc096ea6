"""Exchange between EP ranks: NCCL on GPUs, gloo on CPU, nothing at all on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...core.errors import PlacementError


class EpGroup:
    """Exchange between the ranks that share a layer's experts.

    With gloo the reduction adds the ranks' parts in ascending order of rank (an all-to-all, then
    sums), as the all-to-all exchange adds a token's: so both exchanges, whole or in chunks, give
    the same bits, whatever order gloo's own reduce-scatter has in a release of torch. With NCCL it
    is NCCL's.

    Args:
        group: a process group; None for the default one.

    Attributes:
        rank: this process in the group.
        size: EP ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not dist.is_initialized():
            raise PlacementError(
                "torch.distributed is not initialised: call init_process_group first, or use "
                "EpGroup.single()"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._in_order = dist.get_backend(group) != "nccl"
        # Renamed in torch 2.13; the old names warn there.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._reduce_scatter = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )

    @classmethod
    def single(cls) -> EpGroup:
        """Return one rank that talks to nobody; it needs no process group."""
        group = object.__new__(cls)
        group.rank, group.size, group._in_order = 0, 1, True
        return group

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather ``[n, ...]`` of every rank, in equal shapes, into ``[ranks * n, ...]`` in order.

        Rows stand in order of rank.
        """
        if self.size == 1:
            return x
        result = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if result.numel():
            self._all_gather(result, x.contiguous(), group=self._group)
        return result

    def gather_others(self, x: torch.Tensor) -> torch.Tensor:
        """Gather ``[n, ...]`` of every other rank into ``[(ranks - 1) * n, ...]`` in rank order."""
        result = x.new_empty(((self.size - 1) * x.shape[0], *x.shape[1:]))
        if result.numel():
            x, others = x.contiguous(), [rank for rank in range(self.size) if rank != self.rank]
            peers = [
                rank if self._group is None else dist.get_global_rank(self._group, rank)
                for rank in others
            ]
            pairs = [dist.P2POp(dist.isend, x, peer, self._group) for peer in peers]
            pairs += [
                dist.P2POp(dist.irecv, part, peer, self._group)
                for part, peer in zip(result.view(len(peers), *x.shape).unbind(0), peers)
            ]
            for work in dist.batch_isend_irecv(pairs):
                work.wait()
        return result

    def all_gather_ints(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Gather the ranks' numbers, ``[ranks][n]``, on the host; waits for the device."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        return self.all_gather(mine).view(self.size, -1).tolist()

    def all_to_all(
        self, x: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> torch.Tensor:
        """Send rows ordered by target, and return those received, ordered by source.

        Shapes: ``[sum of send_counts, ...]`` to ``[sum of receive_counts, ...]``.
        """
        if self.size == 1:
            return x
        result = x.new_empty((sum(receive_counts), *x.shape[1:]))
        dist.all_to_all_single(
            result, x.contiguous(), list(receive_counts), list(send_counts), group=self._group
        )
        return result

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``[ranks * n, ...]`` over the ranks, and return this rank's ``[n, ...]``."""
        if self.size == 1:
            return x
        rows = x.shape[0] // self.size
        if not x.numel():
            return x[:rows]
        if not self._in_order:
            result = x.new_empty((rows, *x.shape[1:]))
            self._reduce_scatter(result, x.contiguous(), group=self._group)
            return result
        parts = self.all_to_all(x, [rows] * self.size, [rows] * self.size).view(
            self.size, rows, *x.shape[1:]
        )
        return add_in_order(parts.unbind(0))


def add_in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add equal shapes from the first to the last, rounded once to their own type.

    The sum is taken in float32 or wider.
    """
    if len(parts) == 2:
        return parts[0] + parts[1]  # of two, torch itself rounds once
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(parts[0].dtype)
