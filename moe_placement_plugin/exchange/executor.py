"""Carrying a plan out on one rank, in place, over torch.distributed (gloo or NCCL).

Per chunk: everything that comes in is received or read into staging memory, all ranks agree (`agreement`), and only then are weights
overwritten: copies within the rank, then the staged experts. Weights are untouched until the agreement, and the rest is local.

The experts' tensors are moved as bytes, all of an expert's tensors in the same round: no type is converted, NaNs keep their bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import PlacementError
from .agreement import Agreement, ExchangeAborted
from .plan import SCRATCH, Chunk, ExchangePlan
from .watchdog import WaitingFor, Watchdog
from .weights import Parameter, layout_digest, padded_bytes, view_weights

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


_TAG = 0x6D6F65
"""Of the receive that is never answered (`Exchange._give_up_transfers`)."""


class ExpertReader(Protocol):
    """Reads an expert that no live rank holds; `checkpoint.CheckpointReader` is one."""

    def read(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Fill ``out``, one tensor for each tensor of the layer, of the shape of one slot; returns the bytes read."""
        ...


@dataclass
class ExchangeReport:
    """What an exchange did on this rank.

    Attributes:
        seconds: of all chunks, without what the caller did between them.
        longest: seconds of the longest chunk: the pause, when a server serves between chunks.
        chunks: how many were committed.
        bytes_sent, bytes_received, bytes_read: of experts, without padding; read is from the checkpoint.
        staging_bytes: allocated for staging.
    """

    seconds: float = 0.0
    longest: float = 0.0
    chunks: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_read: int = 0
    staging_bytes: int = 0


@dataclass
class _Staged:
    """Experts in staging memory: where each goes, its parameters as rows of bytes."""

    buffer: torch.Tensor
    used: int = 0
    experts: list[tuple[int, int, list[torch.Tensor]]] = field(default_factory=list)

    def take(self, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
        rows = []
        for parameter in parameters:
            rows.append(self.buffer[self.used : self.used + parameter.bytes])
            self.used += parameter.padded
        return rows


class Exchange:
    """One exchange on one rank.

    Args:
        plan: the same on all ranks.
        weights: this rank's tensors ``[slots, ...]`` of each layer, changed in place: ``{layer: [tensor, ...]}`` by index of the layer within
            the model, or a list of lists in the order of the placement's rows.
        group: process group of all EP ranks, or of the live ones only; the default group when left out. An aborted exchange leaves it
            unusable: give the exchange a group of its own.
        epoch: number of the exchange, equal on all ranks and never used twice.
        store: for the agreement; the default group's when left out. See `agreement` on where it should live.
        staging_bytes: bound on staging memory; None stages all layers at once. It must hold what the busiest rank takes in of one layer.
        max_layers: most layers of a chunk.
        reader: for experts that no live rank holds.
        timeout: seconds that a transfer or a vote may take before the exchange is aborted.
        watchdog: one that only warns, after 30 s, when left out.

    Raises:
        PlacementError: when the arguments do not fit together. Nothing was sent then.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        weights: Mapping[int, Sequence[torch.Tensor]] | Sequence[Sequence[torch.Tensor]],
        group: dist.ProcessGroup | None = None,
        *,
        epoch: int,
        store: dist.Store | None = None,
        staging_bytes: int | None = None,
        max_layers: int | None = None,
        reader: ExpertReader | None = None,
        timeout: float = 60.0,
        watchdog: Watchdog | None = None,
    ):
        import torch
        import torch.distributed as dist

        if len(plan.reads) and reader is None:
            row, expert = plan.reads[0, :2].tolist()
            raise PlacementError(
                f"no live rank holds expert {expert} of layer {plan.new.layer_ids[row]} ({len(plan.reads)} such in all): give a reader for "
                "the checkpoint"
            )
        self.plan = plan
        self.group = dist.group.WORLD if group is None else group
        self.rank, self._global_rank = _ranks_of(plan, self.group)
        self._layers = view_weights(weights, plan.old, plan.new, self.rank)
        sizes = padded_bytes(self._layers)
        self.chunks = plan.chunks(staging_bytes, max_layers, sizes)
        self.metadata = plan.metadata()
        self.report = ExchangeReport(staging_bytes=max((int(c.staging_bytes[self.rank]) for c in self.chunks), default=0))
        self._device = next((p.rows.device for parameters in self._layers for p in parameters), torch.device("cpu"))
        self._reader, self._timeout = reader, timeout
        self._watchdog = watchdog or Watchdog()
        self._limits = (staging_bytes, max_layers)
        self._agreement = Agreement(
            dist.distributed_c10d._get_default_store() if store is None else store,
            epoch,
            self.rank,
            plan.live_ranks,
            timeout,
            lambda: self._watchdog.expired and f"rank {self.rank} gave up while it waited for: {self._watchdog.expired}",
        )

    def run(self, on_commit: Callable[[tuple[int, ...]], None] | None = None) -> ExchangeReport:
        """Carry out all chunks.

        Args:
            on_commit: called after each chunk with the rows of its layers, to put their new maps into force.

        Raises:
            ExchangeAborted: on all survivors alike, when any rank fails before the last chunk is agreed on.
            ExchangeLost: when the outcome cannot be known.
        """
        for rows in self.steps():
            if on_commit is not None:
                on_commit(rows)
        return self.report

    def steps(self) -> Iterator[tuple[int, ...]]:
        """Carry out one chunk at each step; yields the rows of its layers, whose new maps must come into force before the next forward pass.

        Between steps the server may serve; all ranks must take as many steps.

        Raises:
            ExchangeAborted, ExchangeLost: as `run`.
        """
        import torch

        staging = torch.empty(self.report.staging_bytes, dtype=torch.uint8, device=self._device)
        for index, chunk in enumerate(self.chunks):
            begin = time.perf_counter()
            with self._watchdog.watch(self._give_up_transfers):
                staged = _Staged(staging)
                reason = self._agreement.enter(self._digest()) if index == 0 else None
                try:
                    if reason is None:
                        self._connect(index)
                        self._stage(chunk, staged)
                except Exception as error:
                    # Whatever it was, the others wait for this rank: they are told before anybody is.
                    self._end(index, self._describe(error), error)
                if reason is not None:
                    self._end(index, reason)
                self._wait_for(chunk, "agree", peers=self.plan.live_ranks)
                reason = self._agreement.vote(index)
                if reason is not None:
                    self._end(None, reason)
                self._wait_for(chunk, "commit")
                self._commit(chunk, staged)
            self.metadata.committed[list(chunk.rows)] = True
            if index and self.rank == self.plan.live_ranks[0]:
                self._agreement.forget(index - 1)
            taken = time.perf_counter() - begin
            self.report.seconds += taken
            self.report.longest = max(self.report.longest, taken)
            self.report.chunks += 1
            yield chunk.rows

    def survivors(self, grace: float | None = None) -> tuple[int, ...]:
        """EP ranks that are alive after an abort, the same on all of them.

        Args:
            grace: seconds for the others to notice; the exchange's timeout when left out.

        Raises:
            ExchangeLost: when this rank came too late, or the store is gone.
        """
        return self._agreement.survivors(self._timeout if grace is None else grace)

    def _digest(self) -> str:
        return f"{self.plan.digest} {layout_digest(self._layers)} {self._limits}"

    def _connect(self, index: int) -> None:
        """NCCL makes its communicator at the first call on a group, which all members must take part in."""
        import torch
        import torch.distributed as dist

        if index == 0 and self._device.type != "cpu":
            dist.all_reduce(torch.zeros(1, device=self._device), group=self.group)

    def _stage(self, chunk: Chunk, staged: _Staged) -> None:
        """Bring everything that the chunk brings to this rank into staging memory, and send what others need."""
        import torch.distributed as dist

        mine = (chunk.transfers[:, 2] == self.rank) | (chunk.transfers[:, 4] == self.rank)
        rounds: dict[int, list[list[int]]] = {}
        for number, transfer in zip(chunk.round_of[mine].tolist(), chunk.transfers[mine].tolist()):
            rounds.setdefault(number, []).append(transfer)
        reads = iter([read for read in chunk.reads.tolist() if read[2] == self.rank])
        for number, transfers in rounds.items():
            operations, peers, size = [], [], 0
            for row, _expert, source, slot, rank, to in transfers:
                parameters = self._layers[row]
                amount = sum(p.bytes for p in parameters)
                if source == self.rank:
                    operation, peer, tensors = dist.isend, rank, [p.rows[slot] for p in parameters]
                    self.report.bytes_sent += amount
                else:
                    operation, peer, tensors = dist.irecv, source, staged.take(parameters)
                    staged.experts.append((row, to, tensors))
                    self.report.bytes_received += amount
                operations += [dist.P2POp(operation, t, self._global_rank[peer], self.group) for t in tensors if t.numel()]
                peers.append(peer)
                size += amount
            pending = dist.batch_isend_irecv(operations)
            self._read_next(chunk, reads, staged)
            self._wait_for(chunk, "receive", number, peers, size)
            self._finish(pending)
        while self._read_next(chunk, reads, staged):
            pass
        self._settle()

    def _read_next(self, chunk: Chunk, reads: Iterator[list[int]], staged: _Staged) -> bool:
        """Read one expert from the checkpoint while the network is busy."""
        found = next(reads, None)
        if found is None:
            return False
        row, expert, _rank, slot = found
        parameters = self._layers[row]
        tensors = staged.take(parameters)
        self._wait_for(chunk, "read", size=sum(p.bytes for p in parameters))
        typed = [p.typed(t) for p, t in zip(parameters, tensors)]
        self.report.bytes_read += self._reader.read(self.plan.new.layer_ids[row], expert, typed)
        staged.experts.append((row, slot, tensors))
        return True

    def _finish(self, pending: list[dist.Work]) -> None:
        from datetime import timedelta

        for work in pending:
            if self._device.type == "cpu":
                work.wait(timedelta(seconds=self._timeout))
            else:
                work.wait()  # orders the stream only; `_settle` waits for the device

    def _settle(self) -> None:
        """Wait until the device has received everything, without blocking where no interruption would be noticed."""
        if self._device.type == "cpu":
            return
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

    def _commit(self, chunk: Chunk, staged: _Staged) -> None:
        """Overwrite the chunk's slots; nothing here can fail or needs another rank."""
        scratch: list[torch.Tensor] | None = None
        for row, rank, source, to in chunk.copies.tolist():
            if rank != self.rank:
                continue
            parameters = self._layers[row]
            if to == SCRATCH:
                used = staged.used
                scratch = staged.take(parameters)
                staged.used = used  # one scratch expert serves all cycles, one after the other
            for k, parameter in enumerate(parameters):
                read = scratch[k] if source == SCRATCH else parameter.rows[source]
                (scratch[k] if to == SCRATCH else parameter.rows[to]).copy_(read)
        for row, slot, tensors in staged.experts:
            for parameter, tensor in zip(self._layers[row], tensors):
                parameter.rows[slot].copy_(tensor)

    def _wait_for(self, chunk: Chunk, step: str, number: int | None = None, peers: Sequence[int] = (), size: int = 0) -> None:
        layers = tuple(self.plan.new.layer_ids[row] for row in chunk.rows)
        self._watchdog.waits_for(WaitingFor(step, layers, number, tuple(peers), size))

    def _describe(self, error: Exception) -> str:
        return f"rank {self.rank}, {self._watchdog.waiting}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _end(self, refuse: int | None, reason: str, cause: Exception | None = None) -> None:
        """Leave the exchange, having refused the chunk if this rank has not voted for it."""
        try:
            if refuse is not None:
                reason = self._agreement.abort(refuse, reason)
        finally:
            self._give_up_transfers()
        raise ExchangeAborted(reason, self.metadata) from cause

    def _give_up_transfers(self) -> None:
        """Break the group's connections, so that no rank goes on waiting for this one."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        if dist.get_backend(self.group) != "gloo":
            self.group.abort()
            return
        # gloo has no abort: a receive that runs out of its time closes all connections of the group. Its tag is not that of any
        # transfer: gloo ends the process when a message is longer than the buffer it meets.
        nothing = torch.empty(1, dtype=torch.uint8)
        for rank in self.plan.live_ranks:
            if rank != self.rank:
                try:
                    dist.irecv(nothing, self._global_rank[rank], self.group, tag=_TAG).wait(timedelta(milliseconds=1))
                except (RuntimeError, ValueError):
                    continue


def _ranks_of(plan: ExchangePlan, group: dist.ProcessGroup) -> tuple[int, dict[int, int]]:
    """This EP rank, and the global rank of each live one."""
    import torch.distributed as dist

    live = plan.live_ranks
    if group.size() == plan.new.num_ranks:
        members = {rank: rank for rank in live}
    elif group.size() == len(live):
        members = dict(zip(live, range(len(live))))
    else:
        raise PlacementError(
            f"a process group of {group.size()} for a plan of {plan.new.num_ranks} EP ranks, {len(live)} of them live: give the group of "
            "all EP ranks or of the live ones"
        )
    own = [rank for rank, member in members.items() if member == group.rank()]
    if not own:
        raise PlacementError(f"this process is EP rank {group.rank()}, which the plan counts as dead: only live ranks {list(live)} take part")
    return own[0], {rank: dist.get_global_rank(group, member) for rank, member in members.items()}
