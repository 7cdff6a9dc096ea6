"""Carry a plan out on one rank, in place, over torch.distributed (gloo or NCCL).

Per chunk: everything that comes in is received or read into staging memory, all ranks agree
(`commit`), and only then are weights overwritten: copies within the rank, then the staged experts.
Weights are untouched until the agreement, and the rest is local.

While one chunk is agreed on and committed the next one's transfers run already, into the other half
of the staging memory: a layer belongs to one chunk only, so that nothing is sent that the commit
overwrites.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import PlacementError
from .checkpoint import ExpertReader
from .chunks import Chunk
from .commit import Agreement, ExchangeAborted, ExchangeLost
from .communication import Communication, members_of
from .device_queue import DeviceQueue
from .expert_memory import LocalExperts, Parameter, layout_digest, view_weights
from .peer_memory import PeerMemory, SeenPeers
from .plan import ExchangePlan
from .staging import Memory, Staged
from .transfers import Transfers
from .watchdog import WaitingFor, Watchdog

if TYPE_CHECKING:
    import torch


@dataclass
class ExchangeReport:
    """Tell what an exchange did on this rank.

    Attributes:
        seconds: of all chunks, without what the caller did between them.
        longest: seconds of the longest chunk: the pause, when a server serves between chunks.
        chunks: how many were committed.
        bytes_sent, bytes_received, bytes_read: of experts, without padding; read is from the
            checkpoint.
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
    """Carries out one exchange on one rank.

    Args:
        plan: the same on all ranks.
        weights: this rank's tensors ``[slots, ...]`` of each layer, changed in place:
            ``{layer: [tensor, ...]}`` by index of the layer within the model, or a list of lists in
            the order of the placement's rows; or what `expert_memory.view_parameter` made of them.
        communication: between the ranks.
        memory: what it may take; all layers are received at once when left out.
        reader: for experts that no live rank holds.
        watchdog: one that only warns, after 30 s, when left out.
        peers: the weights that ranks read in each other's memory; all experts are sent when left
            out.

    Raises:
        PlacementError: when the arguments do not fit together. Nothing was sent then.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        weights: Mapping[int, Sequence[torch.Tensor | Parameter]]
        | Sequence[Sequence[torch.Tensor | Parameter]],
        communication: Communication,
        memory: Memory | None = None,
        reader: ExpertReader | None = None,
        watchdog: Watchdog | None = None,
        peers: PeerMemory | None = None,
    ):
        _check_reader(plan, reader)
        self.plan = plan
        self.rank, members = members_of(plan, communication.process_group)
        layers = view_weights(weights, plan.old, plan.new, self.rank)
        seen = None if peers is None else SeenPeers.of(peers, plan.new.layer_ids)
        self._experts = LocalExperts(layers, self.rank, () if seen is None else seen.mapped)
        self._memory = Memory() if memory is None else memory
        self.chunks = self._cut(self._memory.staging_bytes)
        self.metadata = plan.metadata()
        self.report = ExchangeReport()
        self._timeout = communication.timeout
        self._watchdog = watchdog or Watchdog()
        queue = DeviceQueue(self._experts.device, self._timeout, self._watchdog)
        self._reads_peers = seen is not None
        self._transfers = Transfers(plan, self._experts, members, queue, self._memory, seen, reader)
        self._agreement = Agreement(
            communication.agreement_store,
            communication.epoch,
            self.rank,
            plan.live_ranks,
            self._timeout,
            self._interruption,
        )

    def run(
        self,
        on_commit: Callable[[tuple[int, ...]], None] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> ExchangeReport:
        """Carry out all chunks, each one's transfers while the one before is committed.

        Args:
            on_commit: called after each chunk with the rows of its layers, to put their new maps
                into force.
            meanwhile: called once while the first transfers run, such as `forget` of an exchange
                that all ranks have ended.

        Raises:
            ExchangeAborted: on all survivors alike, when any rank fails before the last chunk is
                agreed on.
            ExchangeLost: when the outcome cannot be known.
        """
        bound = self._memory.staging_bytes
        half = None if bound is None else bound // 2
        needed = self.plan.staging_needed(self._experts.padded).max(initial=0)
        ahead = half is None or needed <= half
        if ahead and half is not None and len(self.chunks) > 1:
            self.chunks = self._cut(half)
        several = len(self.chunks) > 1
        steps = self._carry_out(
            ahead=several and ahead,
            double=several and not ahead and self._memory.double,
            meanwhile=meanwhile,
        )
        for rows in steps:
            if on_commit is not None:
                on_commit(rows)
        return self.report

    def steps(self) -> Iterator[tuple[int, ...]]:
        """Carry out one chunk at each step; yields the rows of its layers.

        Their new maps must come into force before the next forward pass. Between steps the server
        may serve, and nothing is under way then; all ranks must take as many steps. The process
        that holds the store may end when the steps are exhausted.

        Raises:
            ExchangeAborted, ExchangeLost: as `run`.
        """
        return self._carry_out(ahead=False)

    def _carry_out(
        self, ahead: bool, double: bool = False, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, ...]]:
        parts = self._transfers.reserve(self.chunks, ahead, double)
        ahead = len(parts) > 1
        staged: dict[int, Staged] = {}
        for index, chunk in enumerate(self.chunks):
            began = time.perf_counter()
            with self._watchdog.watch(self._transfers.give_up):
                if index == 0:
                    self._enter()
                try:
                    if index == 0:
                        self._transfers.prepare()
                    for number in range(index, min(index + 1 + ahead, len(self.chunks))):
                        if number not in staged:
                            part = parts[number % len(parts)]
                            staged[number] = self._transfers.begin(self.chunks[number], part)
                    if index == 0 and meanwhile is not None:
                        meanwhile()
                    self._transfers.read(chunk, staged[index])
                    self._transfers.finish(staged[index])
                except Exception as error:
                    # Whatever it was, the others wait for this rank: they are told before anybody.
                    self._end(index, self._describe(error), error)
                self._agree(index)
                self._wait_for(chunk, "commit")
                self._transfers.commit(chunk, staged.pop(index))
            self.metadata.committed[list(chunk.rows)] = True
            self._note(time.perf_counter() - began)
            yield chunk.rows
        if self.chunks:
            self._stay()

    def _enter(self) -> None:
        """Begin together with the others, or end the exchange."""
        digest = (
            f"{self.plan.digest} {layout_digest(self._experts.layers)} "
            f"{self._memory.staging_bytes, self._memory.max_layers, self._memory.batch_bytes} "
            f"{self._transfers.num_read}"
        )
        if not self._reads_peers:
            reason = self._agreement.enter(digest)
            if reason is not None:
                self._end(0, reason)
            return
        # Others read this rank's weights from now on: what the engine has queued, an earlier
        # exchange's copies among it, must be done.
        self._transfers.settle()
        self._watchdog.waits_for(WaitingFor("enter", (), None, self.plan.live_ranks, 0))
        reason = self._agreement.meet(digest)
        if reason is not None:
            self._end(None, reason)

    def _agree(self, index: int) -> None:
        """Vote for a chunk that is staged here, and wait until all have, or end the exchange."""
        self._wait_for(self.chunks[index], "agree", peers=self.plan.live_ranks)
        reason = self._agreement.vote(index, last=index == len(self.chunks) - 1)
        if reason is not None:
            self._end(None, reason)

    def _note(self, seconds: float) -> None:
        """Note that a chunk was committed."""
        report, transfers = self.report, self._transfers
        report.seconds += seconds
        report.longest = max(report.longest, seconds)
        report.chunks += 1
        traffic = transfers.traffic
        report.bytes_sent, report.bytes_received = traffic.sent, traffic.received
        report.bytes_read = traffic.read
        report.staging_bytes = transfers.staging_bytes
        report.packing_bytes = transfers.packing_bytes

    def _stay(self) -> None:
        """Keep the store, if it is this process's, until all know the fate of the last chunk."""
        began = time.perf_counter()
        with self._watchdog.watch(lambda: None):
            self._watchdog.waits_for(WaitingFor("end", peers=self.plan.live_ranks))
            self._agreement.stay()
        self.report.seconds += time.perf_counter() - began

    def forget(self) -> None:
        """Delete from the store what this exchange was agreed on with, for servers that run long.

        When all ranks have ended it, not before.
        """
        with suppress(ExchangeLost):  # its store has died since, and the keys with it
            self._agreement.forget(len(self.chunks))

    def survivors(self, grace: float | None = None) -> tuple[int, ...]:
        """Return the EP ranks that are alive after an abort, the same on all of them.

        Args:
            grace: seconds for the others to notice; the exchange's timeout when left out.

        Raises:
            ExchangeLost: when this rank came too late, or the store is gone.
        """
        return self._agreement.survivors(self._timeout if grace is None else grace)

    def _cut(self, staging_bytes: int | None) -> tuple[Chunk, ...]:
        return self.plan.chunks(staging_bytes, self._memory.max_layers, self._experts.padded)

    def _wait_for(self, chunk: Chunk, step: str, peers: Sequence[int] = ()) -> None:
        layers = self._transfers.layers_of(chunk)
        self._watchdog.waits_for(WaitingFor(step, layers, None, tuple(peers)))

    def _interruption(self) -> str | None:
        """Say why waiting for votes has to end, if it has."""
        expired = self._watchdog.expired
        return expired and f"rank {self.rank} gave up while it waited for: {expired}"

    def _describe(self, error: Exception) -> str:
        first_line = str(error).splitlines()[0] if str(error) else ""
        return f"rank {self.rank}, {self._watchdog.waiting}: {type(error).__name__}: {first_line}"

    def _end(self, refuse: int | None, reason: str, cause: Exception | None = None) -> None:
        """Leave the exchange, having refused the chunk if this rank has not voted for it."""
        try:
            if refuse is not None:
                reason = self._agreement.abort(refuse, reason)
        finally:
            self._transfers.leave()
        raise ExchangeAborted(reason, self.metadata) from cause


def _check_reader(plan: ExchangePlan, reader: ExpertReader | None) -> None:
    """Refuse a plan that reads experts, of which there is no way to read any."""
    if len(plan.reads) and reader is None:
        first = next(iter(plan.reads))
        raise PlacementError(
            f"no live rank holds expert {first.expert} of layer {plan.new.layer_ids[first.row]} "
            f"({len(plan.reads)} such in all): give a reader for the checkpoint"
        )
