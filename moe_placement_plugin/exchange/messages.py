"""Send experts between ranks: batches of rounds, one message to each rank in a batch.

A message is packed first: one for each tensor would take the host longer than the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .chunks import Chunk
from .communication import Members
from .device_queue import DeviceQueue
from .expert_memory import LocalExperts, copy_rows
from .staging import Staged, Traffic
from .transfer_table import Transfer
from .watchdog import WaitingFor

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_TAG = 0x6D6F65
"""Of the receive that is never answered (`Messages.give_up`)."""

_connected: set[str] = set()


class _Batch(NamedTuple):
    """Hold rounds that are queued together, as far as this rank takes part.

    Attributes:
        first_round: its first round.
        sends, receives: other rank -> what goes to it, what comes from it.
    """

    first_round: int
    sends: dict[int, list[Transfer]]
    receives: dict[int, list[Transfer]]


@dataclass
class _Outgoing:
    """Hold memory to pack messages in: a batch's, and the one's before, maybe under way still."""

    halves: tuple[torch.Tensor, torch.Tensor]
    sending: list[list[dist.Work]] = field(default_factory=lambda: [[], []])
    turn: int = 0


class Messages:
    """Sends and receives the messages of one exchange on one rank.

    Args:
        experts: this rank's.
        members: whom it sends to.
        queue: its device.
        batch_bytes: of a rank's sends in a batch of rounds.
        traffic: counts what is sent and received.
    """

    def __init__(
        self,
        experts: LocalExperts,
        members: Members,
        queue: DeviceQueue,
        batch_bytes: int,
        traffic: Traffic,
    ):
        self._experts, self._queue, self._traffic = experts, queue, traffic
        self._group, self._global_ranks = members
        self._batch_bytes = batch_bytes
        self._parts = [experts.parts(row) for row in range(len(experts.layers))]
        self._outgoing: _Outgoing | None = None
        # Packing goes beside what the engine has queued and beside the commit of the chunk before.
        self._lane = queue.lane()

    def connect(self) -> None:
        """Make NCCL's communicator, which it does at the first call of all members of a group.

        Not when some of them are dead.
        """
        name = self._group.group_name
        complete = len(self._global_ranks) == self._group.size()
        if self._queue.is_cpu or name in _connected or not complete:
            return
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1, device=self._queue.device), group=self._group)
        _connected.add(name)

    def outgoing_bytes(self, chunks: Sequence[tuple[Chunk, np.ndarray]]) -> int:
        """Return the memory that this rank's messages of some chunks are packed in.

        Args:
            chunks: chunk, and which of its transfers are sent, bool ``[transfers]``.
        """
        padded = np.asarray(self._experts.padded, dtype=np.int64)
        largest = 0
        for chunk, sent in chunks:
            mine = (chunk.transfers.from_rank == self._experts.rank) & sent
            numbers = chunk.round_of[mine] // self._rounds_per_batch(chunk)
            sizes = padded[chunk.transfers.row[mine]]
            largest = max(largest, int(np.bincount(numbers, sizes).max(initial=0)))
        return 2 * largest

    def use_outgoing(self, memory: torch.Tensor) -> None:
        """Pack messages in ``memory``, uint8 ``[outgoing_bytes]``, which nothing queued uses."""
        half = memory.numel() // 2
        self._outgoing = _Outgoing((memory[:half], memory[half:]))

    def begin(
        self, chunk: Chunk, sent: np.ndarray, staged: Staged, layers: tuple[int, ...]
    ) -> None:
        """Start to receive what the chunk brings to this rank, and to send what others need.

        Args:
            chunk: of the plan.
            sent: which of its transfers are sent, bool ``[transfers]``.
            staged: takes what comes.
            layers: indices of the chunk's layers within the model, for messages.

        Raises:
            RuntimeError, TimeoutError: when an earlier batch does not get away.
        """
        with self._queue.beside(self._lane):
            for batch in self._batches(chunk, sent):
                waiting = WaitingFor(
                    "receive",
                    layers,
                    batch.first_round,
                    tuple(sorted(batch.sends.keys() | batch.receives.keys())),
                    sum(
                        self._experts.bytes[t.row]
                        for transfers in (*batch.sends.values(), *batch.receives.values())
                        for t in transfers
                    ),
                )
                self._queue.waits_for(waiting)
                staged.pending.append((waiting, self._start(batch, staged)))

    def _start(self, batch: _Batch, staged: Staged) -> list[dist.Work]:
        """Queue all messages of a batch."""
        import torch.distributed as dist

        operations = [(dist.isend, peer, message) for peer, message in self._pack(batch.sends)]
        operations += [
            (dist.irecv, peer, self._unpack(transfers, staged))
            for peer, transfers in batch.receives.items()
        ]
        made = [
            dist.P2POp(call, message, self._global_ranks[peer], self._group)
            for call, peer, message in operations
            if message.numel()
        ]
        works = dist.batch_isend_irecv(made) if made else []
        if batch.sends:
            assert self._outgoing is not None, "messages were packed in it"
            self._outgoing.sending[self._outgoing.turn] = works
        return works

    def _batches(self, chunk: Chunk, sent: np.ndarray) -> Iterator[_Batch]:
        """Yield the batches that this rank takes part in."""
        per_batch, rank = self._rounds_per_batch(chunk), self._experts.rank
        transfers = chunk.transfers
        mine = ((transfers.from_rank == rank) | (transfers.to_rank == rank)) & sent
        batches: dict[int, _Batch] = {}
        numbers = (chunk.round_of[mine] // per_batch).tolist()
        for number, transfer in zip(numbers, transfers.where(mine)):
            batch = batches.setdefault(number, _Batch(number * per_batch, {}, {}))
            if transfer.from_rank == rank:
                batch.sends.setdefault(transfer.to_rank, []).append(transfer)
            else:
                batch.receives.setdefault(transfer.from_rank, []).append(transfer)
        yield from batches.values()

    def _rounds_per_batch(self, chunk: Chunk) -> int:
        """Return how many rounds make a batch.

        The same on all ranks: both ends of a transfer must queue it in the same batch.
        """
        if not len(chunk.transfers):
            return 1
        padded = np.asarray(self._experts.padded, dtype=np.int64)
        size = int(padded[chunk.transfers.row].max())
        return max(1, -(-self._batch_bytes // max(size, 1)))

    def _pack(self, sends: Mapping[int, list[Transfer]]) -> list[tuple[int, torch.Tensor]]:
        """Return (rank, message to it) of a batch."""
        if not sends:
            return []
        outgoing, experts = self._outgoing, self._experts
        assert outgoing is not None, "use_outgoing comes before what sends"
        outgoing.turn = 1 - outgoing.turn
        self._queue.wait(outgoing.sending[outgoing.turn])
        memory, used, messages = outgoing.halves[outgoing.turn], 0, []
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for peer, transfers in sends.items():
            message = memory[used : used + sum(experts.padded[t.row] for t in transfers)]
            used += message.numel()
            messages.append((peer, message))
            targets += self._split(message, transfers)
            for transfer in transfers:
                sources += experts.slot(transfer.row, transfer.from_slot)
                self._traffic.sent += experts.bytes[transfer.row]
        copy_rows(targets, sources)
        return messages

    def _unpack(self, transfers: Sequence[Transfer], staged: Staged) -> torch.Tensor:
        """Return where a rank's message goes; its parts are noted as staged."""
        experts = self._experts
        message = staged.take(sum(experts.padded[t.row] for t in transfers))
        staged.sources += self._split(message, transfers)
        for transfer in transfers:
            staged.targets += experts.slot(transfer.row, transfer.to_slot)
            self._traffic.received += experts.bytes[transfer.row]
        return message

    def _split(self, message: torch.Tensor, transfers: Sequence[Transfer]) -> list[torch.Tensor]:
        """Return the parameters of a message's experts, without the padding between them."""
        parts = [part for transfer in transfers for part in self._parts[transfer.row]]
        pieces = message.view(self._experts.unit).split([length for length, _ in parts])
        return [piece for piece, (_, is_weight) in zip(pieces, parts) if is_weight]

    def give_up(self) -> None:
        """Break the group's connections, so that no rank goes on waiting for this one."""
        import torch
        import torch.distributed as dist

        _connected.discard(self._group.group_name)
        if dist.get_backend(self._group) != "gloo":
            # Back ends that notice dead ranks by themselves have no abort.
            with suppress(RuntimeError, NotImplementedError):
                self._group.abort()
            return
        # gloo has no abort: a receive that runs out of its time closes all connections of the
        # group. Its tag is not that of any transfer: gloo ends the process when a message is longer
        # than the buffer it meets.
        nothing = torch.empty(1, dtype=torch.uint8)
        for rank, peer in self._global_ranks.items():
            if rank != self._experts.rank:
                try:
                    dist.irecv(nothing, peer, self._group, tag=_TAG).wait(timedelta(milliseconds=1))
                except (RuntimeError, ValueError):
                    continue
