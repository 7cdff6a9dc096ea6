"""Experts on their way between ranks: from weights into staging memory, as bytes, all of an expert's tensors together.

No type is converted, NaNs keep their bits. Transfers of a chunk are queued in batches of rounds; in a batch, all that one rank sends
another is one message: it is packed first, since a message for each tensor would take the host longer than the network (10 us, in
which NVLink moves 3 MB). Nothing here waits for the device between two of them; the host waits once, when all of the chunk must be there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .cross_memory import AttachedRows, Process
from .expert_memory import Parameter, widest_unit
from .peer_memory import SeenPeers
from .plan import Chunk
from .watchdog import WaitingFor, Watchdog

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

BATCH_BYTES = 64 << 20
"""A batch costs a launch and a handshake, some 20 us on NVLink: rounds, in each of which every rank sends one expert, are put together until a
rank sends this much in them, 0.2 ms or more."""

READ_SINGLY = 1 << 20
"""Pieces of this many bytes are read in another GPU's memory one by one, by the copy engines, which leave the multiprocessors to the engine;
smaller ones together, by a kernel, since a copy costs the host some 5 us. A piece is a tensor of as many experts as lie one behind the other in
both places: over NVLink pieces of 6 to 12 MB take a tenth longer than one of all (325 against 367 GB/s on H100s)."""

_TAG = 0x6D6F65
"""Of the receive that is never answered (`Transfers.give_up`)."""

_connected: set[str] = set()


@dataclass
class Staged:
    """What a chunk brings to this rank: experts in staging memory and transfers under way.

    Attributes:
        buffer: uint8, staging memory.
        used: bytes of it that are taken.
        sources, targets: what was staged and the slots it goes to, tensor by tensor, in `Transfers.unit`.
        pending: transfers under way, by what is waited for.
        read: on a GPU, the end of what is read in other ranks' memory.
    """

    buffer: torch.Tensor
    used: int = 0
    sources: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    pending: list[tuple[WaitingFor, list[dist.Work]]] = field(default_factory=list)
    read: torch.Event | None = None

    def take(self, size: int) -> torch.Tensor:
        """The next ``size`` bytes of staging memory."""
        self.used += size
        return self.buffer[self.used - size : self.used]

    def take_expert(self, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        """Memory for one expert, a row of bytes for each parameter."""
        return [self.take(parameter.padded)[: parameter.bytes] for parameter in parameters]


@dataclass
class _Outgoing:
    """Memory that messages are packed in: a batch's, and the one's before, which may be under way still."""

    halves: tuple[torch.Tensor, torch.Tensor]
    sending: list[list[dist.Work]] = field(default_factory=lambda: [[], []])
    turn: int = 0


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
        seen: the weights that ranks read in each other's memory.

    Attributes:
        unit: the type that rows are copied as.
        blocks: whether `begin` may wait for other ranks: on CPU, where memory to pack in becomes free when a message has gone.
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
        seen: SeenPeers | None = None,
    ):
        self._layers, self._rank, self._peers, self._group = layers, rank, peers, group
        self._device, self._timeout, self._batch_bytes, self._watchdog = (
            device,
            timeout,
            batch_bytes,
            watchdog,
        )
        self._bytes = [sum(p.bytes for p in parameters) for parameters in layers]
        self._padded = [sum(p.padded for p in parameters) for parameters in layers]
        self._seen = seen
        self.blocks = device.type == "cpu"
        self.unit = widest_unit([*layers, *(seen.mapped if seen else ())])
        self._parts = [_parts(parameters, self.unit.itemsize) for parameters in layers]
        self._outgoing: _Outgoing | None = None
        # Packing and reading go beside what the engine has queued, beside the commit of the chunk before, and beside each other.
        self._lane: Any = None
        self._reading: Any = None
        if device.type != "cpu":
            self._lane, self._reading = (_device_module(device).Stream() for _ in range(2))
        self.sent = self.received = 0

    def allocate(self, size: int) -> torch.Tensor:
        """Staging memory, uint8 ``[size]``."""
        import torch

        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def free_memory(self) -> int:
        """Bytes of the device's memory that nobody has taken; on CPU, where the system overcommits, none."""
        return (
            0
            if self._device.type == "cpu"
            else _device_module(self._device).mem_get_info(self._device)[0]
        )

    def connect(self) -> None:
        """NCCL makes its communicator at the first call on a group, which all members must take part in: not when some are dead."""
        if (
            self._device.type == "cpu"
            or self._group.group_name in _connected
            or len(self._peers) < self._group.size()
        ):
            return
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)
        _connected.add(self._group.group_name)

    def outgoing_bytes(self, chunks: Sequence[Chunk]) -> int:
        """Memory that this rank's messages are packed in while it sends these chunks (`use_outgoing`)."""
        largest = 0
        for chunk in chunks:
            sent = (chunk.transfers[:, 2] == self._rank) & ~self._is_read(chunk.transfers)
            numbers = chunk.round_of[sent] // self._rounds_per_batch(chunk)
            sizes = np.asarray(self._padded, dtype=np.int64)[chunk.transfers[sent, 0]]
            largest = max(largest, int(np.bincount(numbers, sizes).max(initial=0)))
        return 2 * largest

    def use_outgoing(self, memory: torch.Tensor) -> None:
        """Pack messages in this memory, uint8 ``[outgoing_bytes]``, which nothing queued on the device uses."""
        half = memory.numel() // 2
        self._outgoing = _Outgoing((memory[:half], memory[half:]))

    def begin(
        self, chunk: Chunk, buffer: torch.Tensor, named: Callable[[Chunk], tuple[int, ...]]
    ) -> Staged:
        """Start to receive what the chunk brings to this rank, and to send what others need.

        Args:
            chunk: of the plan.
            buffer: staging memory, not in use any more by what was queued on the device so far.
            named: indices of a chunk's layers within the model, for messages.

        Raises:
            RuntimeError, TimeoutError: as `finish`, when an earlier batch does not get away.
            OSError: when the memory of a rank cannot be read any more.
        """
        import torch.distributed as dist

        staged = Staged(buffer)
        with self._beside(self._reading):
            self._read_peers(chunk, staged, named)
        with self._beside(self._lane):
            for number, sends, receives in self._batches(chunk):
                size = sum(
                    self._bytes[t[0]]
                    for transfers in (*sends.values(), *receives.values())
                    for t in transfers
                )
                waiting = WaitingFor(
                    "receive",
                    named(chunk),
                    number,
                    tuple(sorted(sends.keys() | receives.keys())),
                    size,
                )
                self._watchdog.waits_for(waiting)
                operations = [(dist.isend, peer, message) for peer, message in self._pack(sends)]
                operations += [
                    (dist.irecv, peer, self._unpack(transfers, staged))
                    for peer, transfers in receives.items()
                ]
                made = [
                    dist.P2POp(call, message, self._peers[peer], self._group)
                    for call, peer, message in operations
                    if message.numel()
                ]
                works = dist.batch_isend_irecv(made) if made else []
                staged.pending.append((waiting, works))
                if sends:
                    assert self._outgoing is not None, "messages were packed in it"
                    self._outgoing.sending[self._outgoing.turn] = works
        return staged

    def _is_read(self, transfers: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which transfers ``[n, 6]`` the receiver carries out by itself."""
        if self._seen is None:
            return np.zeros(len(transfers), dtype=bool)
        return self._seen.reads[transfers[:, 4], transfers[:, 2]]

    def _read_peers(
        self, chunk: Chunk, staged: Staged, named: Callable[[Chunk], tuple[int, ...]]
    ) -> None:
        """Copy experts from the memory of other ranks."""
        read = chunk.transfers[self._is_read(chunk.transfers)]
        self.sent += sum(self._bytes[row] for row in read[read[:, 2] == self._rank, 0].tolist())
        mine = read[read[:, 4] == self._rank]
        if not len(mine):
            return
        size = sum(self._bytes[row] for row in mine[:, 0].tolist())
        self.received += size
        waiting = WaitingFor(
            "read peers", named(chunk), None, tuple(np.unique(mine[:, 2]).tolist()), size
        )
        self._watchdog.waits_for(waiting)
        assert self._seen is not None, "a transfer is read only where peers' memory is seen"
        together: list[tuple[torch.Tensor, torch.Tensor]] = []
        attached: dict[Process, list[tuple[int, int, int]]] = {}
        runs, width = list(_runs(mine)), self.unit.itemsize
        # All views of the staging memory at once: slice by slice they take as long as the link does for the bytes.
        sizes = [
            number * own.padded // width
            for row, _, _, _, number in runs
            for own in self._layers[row]
            if own.bytes
        ]
        pieces = iter(staged.take(sum(sizes) * width).view(self.unit).split(sizes))
        for row, rank, slot, to, number in runs:
            for own, theirs in zip(self._layers[row], self._seen.layers[rank][row]):
                if not own.bytes:
                    continue
                target = next(pieces)
                if isinstance(theirs, AttachedRows):
                    at, step = target.data_ptr(), own.padded
                    attached.setdefault(theirs.process, []).extend(
                        (at + k * step, theirs.row(slot + k), own.bytes) for k in range(number)
                    )
                if number > 1:
                    target = target.view(number, -1)
                if own.padded > own.bytes:
                    target = target[..., : own.bytes // width]
                staged.sources.append(target)
                staged.targets.append(own.block(self.unit, to, number))
                if isinstance(theirs, AttachedRows):
                    continue
                if number * own.bytes < READ_SINGLY:
                    together.append((target, theirs.block(self.unit, slot, number)))
                else:
                    target.copy_(theirs.block(self.unit, slot, number), non_blocking=True)
        copy_rows([target for target, _ in together], [source for _, source in together])
        for process, pieces in attached.items():
            process.read(pieces)
        if self._reading is not None:
            staged.read = self._reading.record_event()
        staged.pending.append((waiting, []))

    def _batches(
        self, chunk: Chunk
    ) -> Iterator[tuple[int, dict[int, list[list[int]]], dict[int, list[list[int]]]]]:
        """(first round, transfers to each rank, transfers from each rank) of the batches that this rank takes part in."""
        per_batch = self._rounds_per_batch(chunk)
        mine = (
            (chunk.transfers[:, 2] == self._rank) | (chunk.transfers[:, 4] == self._rank)
        ) & ~self._is_read(chunk.transfers)
        batches: dict[int, tuple[dict[int, list[list[int]]], dict[int, list[list[int]]]]] = {}
        for number, transfer in zip(
            (chunk.round_of[mine] // per_batch).tolist(), chunk.transfers[mine].tolist()
        ):
            sends, receives = batches.setdefault(number, ({}, {}))
            if transfer[2] == self._rank:
                sends.setdefault(transfer[4], []).append(transfer)
            else:
                receives.setdefault(transfer[2], []).append(transfer)
        for number, (sends, receives) in batches.items():
            yield number * per_batch, sends, receives

    def _pack(self, sends: Mapping[int, list[list[int]]]) -> list[tuple[int, torch.Tensor]]:
        """(rank, message to it) of a batch."""
        if not sends:
            return []
        outgoing = self._outgoing
        assert outgoing is not None, "use_outgoing comes before what sends"
        outgoing.turn = 1 - outgoing.turn
        self._wait(outgoing.sending[outgoing.turn])
        memory, used, messages = outgoing.halves[outgoing.turn], 0, []
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for peer, transfers in sends.items():
            message = memory[used : used + sum(self._padded[t[0]] for t in transfers)]
            used += message.numel()
            messages.append((peer, message))
            targets += self._split(message, [t[0] for t in transfers])
            for row, _expert, _source, slot, _rank, _to in transfers:
                sources += [p.units(self.unit)[slot] for p in self._layers[row] if p.bytes]
                self.sent += self._bytes[row]
        copy_rows(targets, sources)
        return messages

    def _unpack(self, transfers: Sequence[list[int]], staged: Staged) -> torch.Tensor:
        """Where a rank's message goes; its parts are noted as staged."""
        message = staged.take(sum(self._padded[t[0]] for t in transfers))
        staged.sources += self._split(message, [t[0] for t in transfers])
        for row, _expert, _source, _slot, _rank, to in transfers:
            staged.targets += [p.units(self.unit)[to] for p in self._layers[row] if p.bytes]
            self.received += self._bytes[row]
        return message

    def _split(self, message: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
        """The parameters of experts of these rows' layers that lie one behind the other, without the padding between them."""
        parts = [part for row in rows for part in self._parts[row]]
        pieces = message.view(self.unit).split([length for length, _ in parts])
        return [piece for piece, (_, is_weight) in zip(pieces, parts) if is_weight]

    def _rounds_per_batch(self, chunk: Chunk) -> int:
        """The same on all ranks: both ends of a transfer must queue it in the same batch."""
        if not chunk.transfers.size:
            return 1
        size = int(np.asarray(self._padded, dtype=np.int64)[chunk.transfers[:, 0]].max())
        return max(1, -(-self._batch_bytes // max(size, 1)))

    def _beside(self, stream: torch.Stream | None) -> AbstractContextManager[Any]:
        """What is queued within goes beside what the engine queues from now on, and behind what it has queued."""
        if stream is None:
            return nullcontext()
        module = _device_module(self._device)
        stream.wait_stream(module.current_stream())
        return module.stream(stream)

    def _wait(self, works: list[dist.Work]) -> None:
        """On CPU until they are done; on a GPU what is queued from now on waits, and the host does not."""
        if self._device.type != "cpu":
            for work in works:
                work.wait()
            return
        while works:  # gloo's can be waited for once only
            works.pop(0).wait(timedelta(seconds=self._timeout))

    def finish(self, staged: Staged) -> None:
        """Wait until all of it is there, without blocking where no interruption would be noticed.

        Raises:
            RuntimeError: when a transfer fails.
            TimeoutError: when it takes too long or the watchdog gave up.
        """
        for waiting, works in staged.pending:
            self._watchdog.waits_for(waiting)
            self._wait(works)
        staged.pending.clear()
        if staged.read is not None:
            _device_module(self._device).current_stream().wait_event(staged.read)
        self.settle()

    def settle(self) -> None:
        """Wait until the device has done what is queued.

        Raises:
            TimeoutError: as `finish`.
        """
        if self._device.type == "cpu":
            return
        done = _device_module(self._device).Event()
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
            with suppress(
                RuntimeError, NotImplementedError
            ):  # back ends that notice dead ranks by themselves have no abort
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


def batch_size(batch_bytes: int, staging_bytes: int | None) -> int:
    """What a batch must hold at least when experts are received in so much memory: little memory, small messages."""
    return batch_bytes if staging_bytes is None else min(batch_bytes, max(1, staging_bytes // 2))


def packing_bytes(
    expert_bytes: int, staging_bytes: int | None, batch_bytes: int = BATCH_BYTES
) -> int:
    """The most memory that a rank's messages are packed in: two batches, the last expert of each over its measure."""
    return 2 * (batch_size(batch_bytes, staging_bytes) + expert_bytes)


def copy_rows(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target, all in a few launches; none of the targets may be a source."""
    import torch

    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _runs(transfers: np.ndarray) -> Iterator[tuple[int, int, int, int, int]]:
    """Transfers ``[n, 6]`` to one rank as (row, source rank, source slot, slot, how many): one where slots follow each other at both ends."""
    ordered = transfers[np.lexsort((transfers[:, 3], transfers[:, 2], transfers[:, 0]))][
        :, [0, 2, 3, 5]
    ]
    follows = (np.diff(ordered, axis=0) == (0, 0, 1, 1)).all(axis=1)
    begins = np.flatnonzero(np.concatenate(([True], ~follows)))
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(ordered)]):
        row, rank, slot, to = ordered[begin].tolist()
        yield row, rank, slot, to, end - begin


def _parts(parameters: Sequence[Parameter], width: int) -> list[tuple[int, bool]]:
    """An expert as it is staged: (length in units of ``width`` bytes, whether it is a parameter and not padding)."""
    found = []
    for parameter in parameters:
        if parameter.bytes:
            found.append((parameter.bytes // width, True))
        if parameter.padded > parameter.bytes:
            found.append(((parameter.padded - parameter.bytes) // width, False))
    return found


def _device_module(device: torch.device) -> ModuleType:
    import torch

    return torch.get_device_module(device)
