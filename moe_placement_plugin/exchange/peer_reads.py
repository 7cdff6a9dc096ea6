"""Copy experts from the memory of other ranks of this rank's host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .cross_memory import AttachedRows, Process
from .device_queue import DeviceQueue
from .expert_memory import LocalExperts, copy_rows
from .peer_memory import SeenPeers
from .staging import Staged, Traffic
from .transfer_table import Transfer, TransferTable
from .watchdog import WaitingFor

if TYPE_CHECKING:
    import torch

READ_SINGLY = 1 << 20
"""Pieces of this many bytes are read in another GPU's memory one by one, smaller ones together.

One by one they are read by the copy engines, which leave the multiprocessors to the engine;
together by a kernel, since a copy costs the host some 5 us. A piece is a tensor of as many experts
as lie one behind the other in both places.
"""


_ENDS = [Transfer._fields.index(name) for name in ("row", "from_rank", "from_slot", "to_slot")]


class _Run(NamedTuple):
    """Hold experts one behind the other both where they are read and where they go."""

    row: int
    rank: int
    slot: int
    to: int
    number: int


class PeerReads:
    """Reads in others' memory for one rank during one exchange.

    Args:
        experts: this rank's.
        seen: the weights that it sees.
        queue: its device.
        traffic: counts what is read here, and what others read of this rank's.
    """

    def __init__(
        self, experts: LocalExperts, seen: SeenPeers, queue: DeviceQueue, traffic: Traffic
    ):
        self._experts, self._seen, self._queue, self._traffic = experts, seen, queue, traffic
        # Beside what the engine has queued, the commit of the chunk before, and messages.
        self._lane = queue.lane()

    def begin(self, transfers: TransferTable, staged: Staged, layers: tuple[int, ...]) -> None:
        """Start to copy experts from the memory of other ranks.

        Args:
            transfers: of all ranks, those that receivers carry out by themselves.
            staged: takes what comes.
            layers: indices of the transfers' layers within the model, for messages.

        Raises:
            OSError: when the memory of a rank cannot be read any more.
        """
        rank = self._experts.rank
        self._traffic.sent += self._bytes(transfers.where(transfers.from_rank == rank))
        mine = transfers.where(transfers.to_rank == rank)
        if not len(mine):
            return
        size = self._bytes(mine)
        self._traffic.received += size
        owners = tuple(np.unique(mine.from_rank).tolist())
        waiting = WaitingFor("read peers", layers, None, owners, size)
        self._queue.waits_for(waiting)
        with self._queue.beside(self._lane):
            self._copy(list(_runs(mine)), staged)
            if self._lane is not None:
                staged.read = self._lane.record_event()
        staged.pending.append((waiting, []))

    def _bytes(self, transfers: TransferTable) -> int:
        return sum(self._experts.bytes[row] for row in transfers.row.tolist())

    def _copy(self, runs: list[_Run], staged: Staged) -> None:
        """Copy runs of experts into staging memory."""
        experts, unit = self._experts, self._experts.unit
        together: list[tuple[torch.Tensor, torch.Tensor]] = []
        attached: dict[Process, list[tuple[int, int, int]]] = {}
        # All views of the staging memory at once: slice by slice they take as long as the link does
        # for the bytes.
        sizes = [
            number * own.padded // unit.itemsize
            for row, _, _, _, number in runs
            for own in experts.layers[row]
            if own.bytes
        ]
        pieces = iter(staged.take(sum(sizes) * unit.itemsize).view(unit).split(sizes))
        for row, rank, slot, to, number in runs:
            for own, theirs in zip(experts.layers[row], self._seen.layers[rank][row]):
                if not own.bytes:
                    continue
                piece = next(pieces)
                target = piece if number == 1 else piece.view(number, -1)
                if own.padded > own.bytes:
                    target = target[..., : own.bytes // unit.itemsize]
                staged.sources.append(target)
                staged.targets.append(own.block(unit, to, number))
                if isinstance(theirs, AttachedRows):
                    begin, step = piece.data_ptr(), own.padded
                    attached.setdefault(theirs.process, []).extend(
                        (begin + k * step, theirs.row(slot + k), own.bytes) for k in range(number)
                    )
                elif number * own.bytes < READ_SINGLY:
                    together.append((target, theirs.block(unit, slot, number)))
                else:
                    target.copy_(theirs.block(unit, slot, number), non_blocking=True)
        copy_rows([target for target, _ in together], [source for _, source in together])
        for process, addresses in attached.items():
            process.read(addresses)


def _runs(transfers: TransferTable) -> Iterator[_Run]:
    """Yield transfers to one rank, put together where slots follow each other at both ends."""
    order = np.lexsort((transfers.from_slot, transfers.from_rank, transfers.row))
    ends = transfers.array[order][:, _ENDS]
    follows = (np.diff(ends, axis=0) == (0, 0, 1, 1)).all(axis=1)
    begins = np.flatnonzero(np.concatenate(([True], ~follows)))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(ends)]):
        row, rank, slot, to = ends[begin].tolist()
        yield _Run(row, rank, slot, to, end - begin)
