"""Move the bytes of an exchange on one rank: into staging memory, then into the slots.

All of an expert's tensors travel together, as bytes: no type is converted, NaNs keep their bits.
Nothing here waits for the device between two transfers; the host waits once, when all of the chunk
must be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .checkpoint import ExpertReader
from .chunks import Chunk
from .communication import Members
from .device_queue import DeviceQueue
from .expert_memory import LocalExperts, copy_rows
from .messages import Messages
from .peer_memory import SeenPeers
from .peer_reads import PeerReads
from .plan import ExchangePlan
from .staging import Memory, Staged, Traffic
from .transfer_table import SCRATCH
from .watchdog import WaitingFor

if TYPE_CHECKING:
    import torch

DOUBLE_LEAVES = 4
"""Staging memory is doubled where the device has this many times the added part free.

The rest is left to the engine, which may have to allocate for the next forward pass.
"""


class Transfers:
    """Moves all that one exchange moves on one rank.

    Args:
        plan: the same on all ranks.
        experts: this rank's.
        members: whom it sends to.
        queue: its device.
        memory: what it may take.
        seen: the weights that ranks read in each other's memory; None sends all.
        reader: for experts that no live rank holds.

    Attributes:
        traffic: what has moved.
        num_read: transfers of the plan that their receivers read in the sender's memory.
        staging_bytes: memory that experts are received in.
        packing_bytes: memory that messages are packed in.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        experts: LocalExperts,
        members: Members,
        queue: DeviceQueue,
        memory: Memory,
        seen: SeenPeers | None = None,
        reader: ExpertReader | None = None,
    ):
        self._plan, self._experts, self._queue = plan, experts, queue
        self._memory, self._seen, self._reader = memory, seen, reader
        self.traffic = Traffic()
        self.staging_bytes = self.packing_bytes = 0
        self._messages = Messages(experts, members, queue, memory.batch_size, self.traffic)
        self._reads = None if seen is None else PeerReads(experts, seen, queue, self.traffic)
        transfers = plan.transfers
        self.num_read = 0 if seen is None else int(seen.are_read(transfers).sum())
        self._sends = self.num_read < len(transfers)

    def reserve(self, chunks: Sequence[Chunk], ahead: bool, double: bool) -> list[torch.Tensor]:
        """Take memory for the chunks: one part to stage in, or two that take turns.

        Args:
            chunks: all of the exchange.
            ahead: two, on all ranks.
            double: two where this rank has the memory. That is its own affair, since the order of
                its transfers stays the same, but only where it never waits for another rank as it
                begins a chunk: who is not ahead would in turn wait for this rank's vote.
        """
        need = max((int(c.staging_bytes[self._experts.rank]) for c in chunks), default=0)
        packed = self._messages.outgoing_bytes([(chunk, self._are_sent(chunk)) for chunk in chunks])
        size = packed + (2 if ahead else 1) * need
        kept = self._memory.kept
        if kept is None or kept.numel() < size:
            kept = self._memory.kept = self._queue.allocate(size)
        self._messages.use_outgoing(kept[:packed])
        parts = list(kept[packed:size].split(need)) if need else [kept[:0]]
        # On a CPU memory to pack in becomes free only when a message has gone.
        waits = self._queue.is_cpu and self._sends
        if double and not waits and need and self._queue.free_memory() >= DOUBLE_LEAVES * need:
            parts.append(self._queue.allocate(need))
        self.staging_bytes, self.packing_bytes = sum(part.numel() for part in parts), packed
        return parts

    def prepare(self) -> None:
        """Tell the reader of all experts that this rank will read, if it cares, and connect."""
        prefetch = getattr(self._reader, "prefetch", None)
        if prefetch is not None:
            reads, layer_ids = self._plan.reads, self._plan.new.layer_ids
            mine = reads.where(reads.rank == self._experts.rank)
            prefetch([(layer_ids[read.row], read.expert) for read in mine])
        if self._sends:
            self._messages.connect()

    def begin(self, chunk: Chunk, buffer: torch.Tensor) -> Staged:
        """Start to receive what the chunk brings to this rank, and to send what others need.

        Args:
            chunk: of the plan.
            buffer: staging memory, not in use any more by what was queued on the device so far.

        Raises:
            RuntimeError, TimeoutError: as `finish`, when an earlier batch does not get away.
            OSError: when the memory of a rank cannot be read any more.
        """
        staged, layers = Staged(buffer), self.layers_of(chunk)
        sent = self._are_sent(chunk)
        if self._reads is not None:
            self._reads.begin(chunk.transfers.where(~sent), staged, layers)
        self._messages.begin(chunk, sent, staged, layers)
        return staged

    def read(self, chunk: Chunk, staged: Staged) -> None:
        """Read what this rank needs from the checkpoint, while the network is busy."""
        experts, wanted = self._experts, []
        for read in chunk.reads.where(chunk.reads.rank == experts.rank):
            parameters = experts.layers[read.row]
            rows = staged.take_expert(parameters)
            layer = self._plan.new.layer_ids[read.row]
            wanted.append((layer, read.expert, [p.typed(r) for p, r in zip(parameters, rows)]))
            staged.sources += experts.in_units(rows)
            staged.targets += experts.slot(read.row, read.slot)
        if not wanted:
            return
        size = sum(tensor.nbytes for _, _, typed in wanted for tensor in typed)
        self._queue.waits_for(WaitingFor("read", self.layers_of(chunk), None, (), size))
        read_all = getattr(self._reader, "read_all", None)
        if read_all is not None:
            self.traffic.read += read_all(wanted)
            return
        assert self._reader is not None, "a plan that reads experts is refused without a reader"
        for layer, expert, typed in wanted:
            self.traffic.read += self._reader.read(layer, expert, typed)

    def finish(self, staged: Staged) -> None:
        """Wait until all of it is there, without blocking where no interruption would be noticed.

        Raises:
            RuntimeError: when a transfer fails.
            TimeoutError: when it takes too long or the watchdog gave up.
        """
        for waiting, works in staged.pending:
            self._queue.waits_for(waiting)
            self._queue.wait(works)
        staged.pending.clear()
        if staged.read is not None:
            self._queue.wait_for_event(staged.read)
        self._queue.settle()

    def commit(self, chunk: Chunk, staged: Staged) -> None:
        """Overwrite the chunk's slots; nothing here can fail or needs another rank."""
        experts = self._experts
        scratch: list[torch.Tensor] = []
        together = _Copies()
        for copy in chunk.copies.where(chunk.copies.rank == experts.rank):
            if copy.to_slot == SCRATCH:
                used = staged.used
                scratch = experts.in_units(staged.take_expert(experts.layers[copy.row]))
                staged.used = used  # one scratch expert serves all cycles, one after the other
            sources, targets = (
                scratch if slot == SCRATCH else experts.slot(copy.row, slot)
                for slot in (copy.from_slot, copy.to_slot)
            )
            together.add((copy.row, copy.from_slot), (copy.row, copy.to_slot), sources, targets)
        together.flush()
        copy_rows(staged.targets, staged.sources)

    def settle(self) -> None:
        """Wait until the device has done what is queued.

        Raises:
            TimeoutError: as `finish`.
        """
        self._queue.settle()

    def give_up(self) -> None:
        """Break the group's connections, so that no rank goes on waiting for this one."""
        self._messages.give_up()

    def leave(self) -> None:
        """Give up where experts are sent: who only reads waits for nobody."""
        if self._sends:
            self.give_up()

    def layers_of(self, chunk: Chunk) -> tuple[int, ...]:
        """Return the indices of a chunk's layers within the model."""
        return tuple(self._plan.new.layer_ids[row] for row in chunk.rows)

    def _are_sent(self, chunk: Chunk) -> np.ndarray:
        """Return which of a chunk's transfers are messages, bool ``[transfers]``."""
        if self._seen is None:
            return np.ones(len(chunk.transfers), dtype=bool)
        return ~self._seen.are_read(chunk.transfers)


@dataclass
class _Copies:
    """Copy within a rank, together what no slot is written between."""

    read: set[tuple[int, int]] = field(default_factory=set)
    written: set[tuple[int, int]] = field(default_factory=set)
    sources: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)

    def add(
        self,
        source: tuple[int, int],
        to: tuple[int, int],
        sources: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor],
    ) -> None:
        """Add one expert, from slot to slot.

        Args:
            source, to: row and slot.
            sources, targets: their tensors.
        """
        # Scratch is one expert's memory whatever the row.
        source, to = ((-1, SCRATCH) if slot[1] == SCRATCH else slot for slot in (source, to))
        if source in self.written or to in self.read or to in self.written:
            self.flush()
        self.read.add(source)
        self.written.add(to)
        self.sources += sources
        self.targets += targets

    def flush(self) -> None:
        """Do what was added."""
        copy_rows(self.targets, self.sources)
        for of_group in (self.read, self.written, self.sources, self.targets):
            of_group.clear()
