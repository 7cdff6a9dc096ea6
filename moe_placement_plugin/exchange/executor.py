"""Carrying a plan out on one rank, in place, over torch.distributed (gloo or NCCL).

Per chunk: everything that comes in is received or read into staging memory, all ranks agree (`agreement`), and only then are weights
overwritten: copies within the rank, then the staged experts. Weights are untouched until the agreement, and the rest is local.

While one chunk is agreed on and committed the next one's transfers run already, into the other half of the staging memory: a layer belongs
to one chunk only, so that nothing is sent that the commit overwrites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..core.errors import PlacementError
from .commit import Agreement, ExchangeAborted, ExchangeLost
from .expert_memory import Parameter, layout_digest, padded_bytes, view_weights
from .peer_memory import PeerMemory, SeenPeers
from .plan import SCRATCH, Chunk, ExchangePlan
from .transfers import BATCH_BYTES, Staged, Transfers, batch_size, copy_rows
from .watchdog import WaitingFor, Watchdog

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


class ExpertReader(Protocol):
    """Reads an expert that no live rank holds; `checkpoint.CheckpointReader` is one.

    One that is quicker with several at once has also ``read_all(wanted)``, which takes a list of `read`'s arguments; one that can have the
    disk begin early has ``prefetch(experts)``, which takes all pairs (layer, expert) of an exchange as it begins.
    """

    def read(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Fill ``out``, one tensor for each tensor of the layer, of the shape of one slot; returns the bytes read."""
        ...


DOUBLE_LEAVES = 4
"""Staging memory is doubled for the time of an exchange where the device has this many times the added part free: the rest is left to the
engine, which may have to allocate for the next forward pass."""


@dataclass
class ExchangeReport:
    """What an exchange did on this rank.

    Attributes:
        seconds: of all chunks, without what the caller did between them.
        longest: seconds of the longest chunk: the pause, when a server serves between chunks.
        chunks: how many were committed.
        bytes_sent, bytes_received, bytes_read: of experts, without padding; read is from the checkpoint.
        staging_bytes: memory that experts were received in.
        packing_bytes: memory that messages were packed in.
    """

    seconds: float = 0.0
    longest: float = 0.0
    chunks: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    bytes_read: int = 0
    staging_bytes: int = 0
    packing_bytes: int = 0


class Exchange:
    """One exchange on one rank.

    Args:
        plan: the same on all ranks.
        weights: this rank's tensors ``[slots, ...]`` of each layer, changed in place: ``{layer: [tensor, ...]}`` by index of the layer within
            the model, or a list of lists in the order of the placement's rows; or what `weights.view_parameter` made of them.
        group: process group of all EP ranks, or of the live ones only; the default group when left out. An aborted exchange leaves it
            unusable: give the exchange a group of its own.
        epoch: number of the exchange, equal on all ranks and never used twice.
        store: for the agreement; the default group's when left out. See `agreement` on where it should live.
        staging_bytes: bound on the memory that experts are received in; None receives all layers at once. It must hold what the busiest
            rank takes in of one layer. Messages are packed in memory for two batches besides (`packing_bytes`).
        max_layers: most layers of a chunk.
        reader: for experts that no live rank holds.
        timeout: seconds that a transfer or a vote may take before the exchange is aborted.
        watchdog: one that only warns, after 30 s, when left out.
        staging: uint8 memory to stage in, kept from one exchange to the next; allocated when left out or too small.
        batch_bytes: rounds of transfers are put together until each holds this much, or half of ``staging_bytes``; all ranks must give the
            same.
        double: where two layers do not fit into ``staging_bytes``, receive one while the other is committed nevertheless, in memory that is
            given back at the end, if the device has several times as much free; not where experts are sent between CPUs.
        peers: the weights that ranks read in each other's memory; all experts are sent when left out.
        meanwhile: called once while the first transfers run, such as `forget` of an exchange that all ranks have ended.

    Raises:
        PlacementError: when the arguments do not fit together. Nothing was sent then.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        weights: Mapping[int, Sequence[torch.Tensor | Parameter]]
        | Sequence[Sequence[torch.Tensor | Parameter]],
        group: dist.ProcessGroup | None = None,
        *,
        epoch: int,
        store: dist.Store | None = None,
        staging_bytes: int | None = None,
        max_layers: int | None = None,
        reader: ExpertReader | None = None,
        timeout: float = 60.0,
        watchdog: Watchdog | None = None,
        staging: torch.Tensor | None = None,
        batch_bytes: int = BATCH_BYTES,
        double: bool = False,
        peers: PeerMemory | None = None,
        meanwhile: Callable[[], None] | None = None,
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
        group = dist.group.WORLD if group is None else group
        self.rank, members = _ranks_of(plan, group)
        self._layers = view_weights(weights, plan.old, plan.new, self.rank)
        self._sizes = padded_bytes(self._layers)
        self._limits, self._double = (staging_bytes, max_layers, batch_bytes), double
        self.chunks = plan.chunks(staging_bytes, max_layers, self._sizes)
        self.metadata = plan.metadata()
        self.report = ExchangeReport()
        device = next(
            (p.rows.device for parameters in self._layers for p in parameters), torch.device("cpu")
        )
        self._reader, self._timeout, self._memory, self._meanwhile = (
            reader,
            timeout,
            staging,
            meanwhile,
        )
        self._watchdog = watchdog or Watchdog()
        batch_bytes = batch_size(batch_bytes, staging_bytes)
        self._meets = peers is not None
        self._direct = (
            plan.transfers[:0]
            if peers is None
            else plan.transfers[peers.reads[plan.transfers[:, 4], plan.transfers[:, 2]]]
        )
        seen = SeenPeers.of(peers, plan.new.layer_ids) if peers is not None else None
        self._transfers = Transfers(
            self._layers,
            self.rank,
            members,
            group,
            device,
            timeout,
            batch_bytes,
            self._watchdog,
            seen,
        )
        self._agreement = Agreement(
            dist.distributed_c10d._get_default_store() if store is None else store,
            epoch,
            self.rank,
            plan.live_ranks,
            timeout,
            lambda: (
                self._watchdog.expired
                and f"rank {self.rank} gave up while it waited for: {self._watchdog.expired}"
            ),
        )

    def run(self, on_commit: Callable[[tuple[int, ...]], None] | None = None) -> ExchangeReport:
        """Carry out all chunks, each one's transfers while the one before is committed.

        Args:
            on_commit: called after each chunk with the rows of its layers, to put their new maps into force.

        Raises:
            ExchangeAborted: on all survivors alike, when any rank fails before the last chunk is agreed on.
            ExchangeLost: when the outcome cannot be known.
        """
        bound, layers, _ = self._limits
        half = None if bound is None else bound // 2
        ahead = half is None or self.plan.staging_needed(self._sizes).max(initial=0) <= half
        if ahead and half is not None and len(self.chunks) > 1:
            self.chunks = self.plan.chunks(half, layers, self._sizes)
        steps = self._carry_out(
            ahead=len(self.chunks) > 1 and ahead,
            double=len(self.chunks) > 1 and not ahead and self._double,
        )
        for rows in steps:
            if on_commit is not None:
                on_commit(rows)
        return self.report

    @property
    def staging(self) -> torch.Tensor | None:
        """The staging memory, for the next exchange."""
        return self._memory

    def steps(self) -> Iterator[tuple[int, ...]]:
        """Carry out one chunk at each step; yields the rows of its layers, whose new maps must come into force before the next forward pass.

        Between steps the server may serve, and nothing is under way then; all ranks must take as many steps. The process that holds the store
        may end when the steps are exhausted.

        Raises:
            ExchangeAborted, ExchangeLost: as `run`.
        """
        return self._carry_out(ahead=False)

    def _carry_out(self, ahead: bool, double: bool = False) -> Iterator[tuple[int, ...]]:
        halves = self._staging(ahead, double)
        ahead = len(halves) > 1
        staged: dict[int, Staged] = {}
        for index, chunk in enumerate(self.chunks):
            begin = time.perf_counter()
            with self._watchdog.watch(self._transfers.give_up):
                reason = self._enter() if index == 0 else None
                try:
                    if reason is None:
                        if index == 0:
                            self._prefetch()
                            if len(self._direct) < len(self.plan.transfers):
                                self._transfers.connect()
                        for next_one in range(index, min(index + 1 + ahead, len(self.chunks))):
                            if next_one not in staged:
                                staged[next_one] = self._transfers.begin(
                                    self.chunks[next_one],
                                    halves[next_one % len(halves)],
                                    self._named,
                                )
                        if index == 0 and self._meanwhile is not None:
                            self._meanwhile()
                        self._read(chunk, staged[index])
                        self._transfers.finish(staged[index])
                except Exception as error:
                    # Whatever it was, the others wait for this rank: they are told before anybody is.
                    self._end(index, self._describe(error), error)
                if reason is not None:
                    self._end(index, reason)
                self._wait_for(chunk, "agree", peers=self.plan.live_ranks)
                reason = self._agreement.vote(index, last=index == len(self.chunks) - 1)
                if reason is not None:
                    self._end(None, reason)
                self._wait_for(chunk, "commit")
                self._commit(chunk, staged.pop(index))
            self.metadata.committed[list(chunk.rows)] = True
            taken = time.perf_counter() - begin
            self.report.seconds += taken
            self.report.longest = max(self.report.longest, taken)
            self.report.chunks += 1
            self.report.bytes_sent, self.report.bytes_received = (
                self._transfers.sent,
                self._transfers.received,
            )
            yield chunk.rows
        if self.chunks:
            self._stay()

    def _stay(self) -> None:
        """Keep the store, if it is this process's, until all know that the last chunk was committed."""
        begin = time.perf_counter()
        with self._watchdog.watch(lambda: None):
            self._watchdog.waits_for(WaitingFor("end", peers=self.plan.live_ranks))
            self._agreement.stay()
        self.report.seconds += time.perf_counter() - begin

    def _enter(self) -> str | None:
        """Begin together with the others; a reason why this rank must not."""
        if not self._meets:
            return self._agreement.enter(self._digest())
        # Others read this rank's weights from now on: what the engine has queued, an earlier exchange's copies among it, must be done.
        self._transfers.settle()
        self._watchdog.waits_for(WaitingFor("enter", (), None, self.plan.live_ranks, 0))
        reason = self._agreement.meet(self._digest())
        if reason is not None:
            self._end(None, reason)
        return None

    def forget(self) -> None:
        """Delete from the store what this exchange was agreed on with, for servers that run long; when all ranks have ended it, not before."""
        with suppress(ExchangeLost):  # its store has died since, and the keys with it
            self._agreement.forget(len(self.chunks))

    def _staging(self, ahead: bool, double: bool) -> list[torch.Tensor]:
        """Memory for the chunks: one part, or two that take turns.

        Args:
            ahead: two, on all ranks.
            double: two where this rank has the memory. That is its own affair, since the order of its transfers stays the same, but only where
                it never waits for another rank as it begins a chunk: who is not ahead would in turn wait for this rank's vote.
        """
        need = max((int(c.staging_bytes[self.rank]) for c in self.chunks), default=0)
        out = self._transfers.outgoing_bytes(self.chunks)
        kept = out + (2 if ahead else 1) * need
        if self._memory is None or self._memory.numel() < kept:
            self._memory = self._transfers.allocate(kept)
        self._transfers.use_outgoing(self._memory[:out])
        parts = list(self._memory[out:kept].split(need)) if need else [self._memory[:0]]
        waits = self._transfers.blocks and len(self._direct) < len(self.plan.transfers)
        if double and not waits and need and self._transfers.free_memory() >= DOUBLE_LEAVES * need:
            parts.append(self._transfers.allocate(need))
        self.report.staging_bytes, self.report.packing_bytes = (
            sum(part.numel() for part in parts),
            out,
        )
        return parts

    def survivors(self, grace: float | None = None) -> tuple[int, ...]:
        """EP ranks that are alive after an abort, the same on all of them.

        Args:
            grace: seconds for the others to notice; the exchange's timeout when left out.

        Raises:
            ExchangeLost: when this rank came too late, or the store is gone.
        """
        return self._agreement.survivors(self._timeout if grace is None else grace)

    def _digest(self) -> str:
        return (
            f"{self.plan.digest} {layout_digest(self._layers)} {self._limits} {len(self._direct)}"
        )

    def _prefetch(self) -> None:
        """Tell the reader of all experts that this rank will read, of all chunks, if it cares."""
        prefetch = getattr(self._reader, "prefetch", None)
        if prefetch is not None:
            reads = self.plan.reads
            prefetch(
                [
                    (self.plan.new.layer_ids[row], expert)
                    for row, expert in reads[reads[:, 2] == self.rank, :2].tolist()
                ]
            )

    def _read(self, chunk: Chunk, staged: Staged) -> None:
        """Read what this rank needs from the checkpoint, while the network is busy."""
        wanted = []
        for row, expert, rank, slot in chunk.reads.tolist():
            if rank == self.rank:
                parameters, unit = self._layers[row], self._transfers.unit
                tensors = staged.take_expert(parameters)
                wanted.append(
                    (
                        self.plan.new.layer_ids[row],
                        expert,
                        [p.typed(t) for p, t in zip(parameters, tensors)],
                    )
                )
                staged.sources += [t.view(unit) for t in tensors]
                staged.targets += [p.units(unit)[slot] for p in parameters]
        if not wanted:
            return
        self._wait_for(chunk, "read", size=sum(t.nbytes for _, _, typed in wanted for t in typed))
        read_all = getattr(self._reader, "read_all", None)
        if read_all is not None:
            self.report.bytes_read += read_all(wanted)
            return
        assert self._reader is not None, "a plan that reads experts is refused without a reader"
        for layer, expert, typed in wanted:
            self.report.bytes_read += self._reader.read(layer, expert, typed)

    def _commit(self, chunk: Chunk, staged: Staged) -> None:
        """Overwrite the chunk's slots; nothing here can fail or needs another rank."""
        unit, scratch = self._transfers.unit, []
        together = _Copies()
        for row, rank, source, to in chunk.copies.tolist():
            if rank != self.rank:
                continue
            parameters = self._layers[row]
            if to == SCRATCH:
                used = staged.used
                scratch = [t.view(unit) for t in staged.take_expert(parameters)]
                staged.used = used  # one scratch expert serves all cycles, one after the other
            together.add(
                (row, source), (row, to),
                scratch if source == SCRATCH else [p.units(unit)[source] for p in parameters],
                scratch if to == SCRATCH else [p.units(unit)[to] for p in parameters],
            )  # fmt: skip
        together.flush()
        copy_rows(staged.targets, staged.sources)

    def _wait_for(self, chunk: Chunk, step: str, peers: Sequence[int] = (), size: int = 0) -> None:
        self._watchdog.waits_for(WaitingFor(step, self._named(chunk), None, tuple(peers), size))

    def _named(self, chunk: Chunk) -> tuple[int, ...]:
        return tuple(self.plan.new.layer_ids[row] for row in chunk.rows)

    def _describe(self, error: Exception) -> str:
        return f"rank {self.rank}, {self._watchdog.waiting}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _end(self, refuse: int | None, reason: str, cause: Exception | None = None) -> None:
        """Leave the exchange, having refused the chunk if this rank has not voted for it."""
        try:
            if refuse is not None:
                reason = self._agreement.abort(refuse, reason)
        finally:
            if len(self._direct) < len(self.plan.transfers):
                self._transfers.give_up()
        raise ExchangeAborted(reason, self.metadata) from cause


@dataclass
class _Copies:
    """Copies within a rank, in order as far as it matters: those between which no slot is written are done together."""

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
        """One expert, from slot to slot, each (row, slot)."""
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
        raise PlacementError(
            f"this process is EP rank {group.rank()}, which the plan counts as dead: only live ranks {list(live)} take part"
        )
    return own[0], {rank: dist.get_global_rank(group, member) for rank, member in members.items()}
