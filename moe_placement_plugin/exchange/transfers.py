"""Experts on their way between ranks: from weights into staging memory, as bytes, all of an expert's tensors together.

No type is converted, NaNs keep their bits. Nothing here waits for the device between two tensors: transfers of a chunk are queued
in batches of rounds, and the host waits once, when all of the chunk must be there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from .plan import Chunk
from .watchdog import WaitingFor, Watchdog
from .weights import Parameter

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

BATCH_BYTES = 64 << 20
"""A round in which every rank sends one expert costs a launch and a handshake, some 20 us on NVLink: rounds are put together until a rank
sends this much in them, 0.2 ms or more."""

_TAG = 0x6D6F65
"""Of the receive that is never answered (`Transfers.give_up`)."""

_connected: set[str] = set()


@dataclass
class Staged:
    """What a chunk brings to this rank: experts in staging memory and transfers under way.

    Attributes:
        buffer: uint8, staging memory.
        used: bytes of it that are taken.
        experts: row, slot and the expert's parameters as rows of bytes.
        pending: transfers under way, by what is waited for.
    """

    buffer: torch.Tensor
    used: int = 0
    experts: list[tuple[int, int, list[torch.Tensor]]] = field(default_factory=list)
    pending: list[tuple[WaitingFor, list[dist.Work]]] = field(default_factory=list)

    def take(self, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        """Memory for one expert."""
        rows = []
        for parameter in parameters:
            rows.append(self.buffer[self.used : self.used + parameter.bytes])
            self.used += parameter.padded
        return rows


class Transfers:
    """The transfers of one exchange on one rank.

    Args:
        layers: parameters of each row's layer.
        rank: this EP rank.
        peers: EP rank -> global rank, of the live ones.
        group: process group.
        device: where weights and staging memory lie.
        timeout: seconds.
        batch_bytes: of a rank's sends in a batch of rounds.
        watchdog: is told what is waited for; ends the wait when it has given up.

    Attributes:
        sent, received: bytes of experts so far.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Parameter]],
        rank: int,
        peers: Mapping[int, int],
        group: dist.ProcessGroup,
        device: torch.device,
        timeout: float,
        batch_bytes: int,
        watchdog: Watchdog,
    ):
        self._layers, self._rank, self._peers, self._group = layers, rank, peers, group
        self._device, self._timeout, self._batch_bytes, self._watchdog = device, timeout, batch_bytes, watchdog
        self._bytes = [sum(p.bytes for p in parameters) for parameters in layers]
        self.sent = self.received = 0

    def allocate(self, size: int) -> torch.Tensor:
        """Staging memory, uint8 ``[size]``."""
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def connect(self) -> None:
        """NCCL makes its communicator at the first call on a group, which all members must take part in: not when some are dead."""
        if self._device.type == "cpu" or self._group.group_name in _connected or len(self._peers) < self._group.size():
            return
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)
        _connected.add(self._group.group_name)

    def begin(self, chunk: Chunk, buffer: torch.Tensor, named: Callable[[Chunk], tuple[int, ...]]) -> Staged:
        """Start to receive what the chunk brings to this rank, and to send what others need.

        Args:
            chunk: of the plan.
            buffer: staging memory, not in use any more by what was queued on the device so far.
            named: indices of a chunk's layers within the model, for messages.
        """
        import torch.distributed as dist

        staged = Staged(buffer)
        per_batch = self._rounds_per_batch(chunk)
        mine = (chunk.transfers[:, 2] == self._rank) | (chunk.transfers[:, 4] == self._rank)
        batches: dict[int, list[list[int]]] = {}
        for number, transfer in zip((chunk.round_of[mine] // per_batch).tolist(), chunk.transfers[mine].tolist()):
            batches.setdefault(number, []).append(transfer)
        for number, transfers in batches.items():
            operations, others, size = [], set(), 0
            for row, _expert, source, slot, rank, to in transfers:
                parameters = self._layers[row]
                if source == self._rank:
                    operation, peer, tensors = dist.isend, rank, [p.rows[slot] for p in parameters]
                    self.sent += self._bytes[row]
                else:
                    operation, peer, tensors = dist.irecv, source, staged.take(parameters)
                    staged.experts.append((row, to, tensors))
                    self.received += self._bytes[row]
                others.add(peer)
                size += self._bytes[row]
                operations += [dist.P2POp(operation, t, self._peers[peer], self._group) for t in tensors if t.numel()]
            waiting = WaitingFor("receive", named(chunk), number * per_batch, tuple(sorted(others)), size)
            self._watchdog.waits_for(waiting)
            staged.pending.append((waiting, dist.batch_isend_irecv(operations)))
        return staged

    def _rounds_per_batch(self, chunk: Chunk) -> int:
        """The same on all ranks: both ends of a transfer must queue it in the same batch."""
        if not chunk.transfers.size:
            return 1
        size = int(np.asarray(self._bytes, dtype=np.int64)[chunk.transfers[:, 0]].max())
        return max(1, -(-self._batch_bytes // max(size, 1)))

    def finish(self, staged: Staged) -> None:
        """Wait until all of it is there, without blocking where no interruption would be noticed.

        Raises:
            RuntimeError: when a transfer fails.
            TimeoutError: when it takes too long or the watchdog gave up.
        """
        for waiting, works in staged.pending:
            self._watchdog.waits_for(waiting)
            for work in works:
                if self._device.type == "cpu":
                    work.wait(timedelta(seconds=self._timeout))
                else:
                    work.wait()  # orders the stream only
        staged.pending.clear()
        if self._device.type != "cpu":
            self._settle()

    def _settle(self) -> None:
        import torch

        done = torch.get_device_module(self._device).Event()
        done.record()
        deadline = time.monotonic() + self._timeout
        while not done.query():
            if self._watchdog.expired:
                raise TimeoutError("interrupted by the watchdog")
            if time.monotonic() > deadline:
                raise TimeoutError(f"transfers not finished after {self._timeout:g} s")
            time.sleep(20e-6)

    def give_up(self) -> None:
        """Break the group's connections, so that no rank goes on waiting for this one."""
        import torch
        import torch.distributed as dist

        _connected.discard(self._group.group_name)
        if dist.get_backend(self._group) != "gloo":
            with suppress(RuntimeError, NotImplementedError):  # back ends that notice dead ranks by themselves have no abort
                self._group.abort()
            return
        # gloo has no abort: a receive that runs out of its time closes all connections of the group. Its tag is not that of any
        # transfer: gloo ends the process when a message is longer than the buffer it meets.
        nothing = torch.empty(1, dtype=torch.uint8)
        for rank, peer in self._peers.items():
            if rank != self._rank:
                try:
                    dist.irecv(nothing, peer, self._group, tag=_TAG).wait(timedelta(milliseconds=1))
                except (RuntimeError, ValueError):
                    continue
