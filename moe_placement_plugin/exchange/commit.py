"""Have ranks agree, through a key-value store, that a chunk is staged everywhere.

A chunk's fate is one key that is written once (`compare_set`): ``commit`` by whoever sees that
every rank has voted, or ``abort`` by whoever fails or waits too long. Whatever is written first
holds for all. A rank votes only when all that the chunk brings it lies in its staging memory, so
after ``commit`` every survivor can finish by itself, whoever dies; before it, no rank has touched a
weight.

Every answer of the store is waited for only so long: when its host vanishes (a link down, power
lost) no connection closes and torch's client would wait for ever.

The store must outlive the ranks: torchrun's and both engines' stores live in one process, and when
that process is the one that dies no decision can be read any more; then every rank stops with
`ExchangeLost`. One that ends, without dying, stays until all have read (`departure`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import PlacementError
from ..hosts.bounded_store import BoundedStore
from .departure import Departure, appears
from .rank_stores import held_here
from .roll import Roll

if TYPE_CHECKING:
    import torch.distributed as dist

    from .commit_metadata import CommitMetadata

MEETING = -1
"""Voted on like a chunk: that all have come (`Agreement.meet`)."""

LEAST_ANSWER = 5.0
"""Seconds that an answer of the store is waited for at least, however short the timeout.

A busy machine is no silent one.
"""


class ExchangeAborted(RuntimeError):
    """Says that the exchange stopped, on every survivor at the same layer.

    Layers are on the old or the new map, none is mixed.

    Attributes:
        reason: what went wrong, on the rank that noticed first.
        metadata: which layers are on the new map; the same on all survivors.
    """

    def __init__(self, reason: str, metadata: CommitMetadata):
        done, total = int(metadata.committed.sum()), metadata.committed.size
        super().__init__(
            f"expert exchange aborted with {done} of {total} layers on the new map, the others on "
            f"the old: {reason}. Make a group of the survivors and exchange from the placement in "
            "force (metadata.in_force())"
        )
        self.reason = reason
        self.metadata = metadata


class ExchangeLost(RuntimeError):
    """Says that the fate of a chunk cannot be known because the store is gone.

    This rank must stop and load its weights anew.
    """


class Agreement:
    """Votes for one rank in one exchange.

    Args:
        store: shared by all ranks of the exchange and no smaller set.
        epoch: number of the exchange, equal on all ranks and never used twice with this store.
        rank, ranks: this EP rank, and all that take part.
        timeout: seconds without the missing votes after which a rank aborts.
        interrupted: asked while waiting; a reason ends the wait with an abort.
    """

    def __init__(
        self,
        store: dist.Store,
        epoch: int,
        rank: int,
        ranks: Sequence[int],
        timeout: float,
        interrupted: Callable[[], str | None] = lambda: None,
    ):
        from torch.distributed import PrefixStore

        self._store = BoundedStore(
            PrefixStore(f"moe-placement-exchange/{int(epoch)}", store), max(timeout, LEAST_ANSWER)
        )
        self._epoch, self._rank, self._ranks, self._timeout = epoch, rank, tuple(ranks), timeout
        self._interrupted = interrupted
        self._alive = Roll("alive", ranks)
        self._held = held_here(store)
        self._departure = Departure(self._store, self._held, rank, ranks, timeout)

    def enter(self, digest: str) -> str | None:
        """Make sure that all ranks carry out the same plan on tensors of the same layout.

        Returns:
            None, or why this rank must not go on.

        Raises:
            PlacementError: when this rank has used the epoch before.
            ExchangeLost: when the store is gone.
        """
        times, first = self._ask(
            lambda s: (
                s.add(f"entered/{self._rank}", 1),
                s.compare_set("plan", "", digest).decode(),
            )
        )
        if times > 1:
            raise PlacementError(
                f"exchange epoch {self._epoch} was used before: number exchanges, each number once"
            )
        self._departure.begin()
        if first == digest:
            return None
        return (
            f"rank {self._rank} has another plan, or tensors of another layout, than the rank that "
            "came first"
        )

    def meet(self, digest: str) -> str | None:
        """Enter (`enter`), and wait until all ranks have done so.

        Returns:
            None, or why not all will.

        Raises:
            PlacementError, ExchangeLost: as `enter`.
        """
        reason = self.enter(digest)
        return self.vote(MEETING) if reason is None else self.abort(MEETING, reason)

    def vote(self, chunk: int, last: bool = False) -> str | None:
        """Say that the chunk is staged here, and wait for its fate.

        Args:
            last: whether the exchange ends with this chunk, so that this rank asks nothing more
                once it knows the fate.

        Returns:
            None when the chunk is to be committed, else why not.

        Raises:
            ExchangeLost: when the store is gone.
        """
        reason = self._vote(chunk)
        if last or reason is not None:
            self._departure.leave()
        return reason

    def _vote(self, chunk: int) -> str | None:
        self._departure.needed()
        deadline = time.monotonic() + self._timeout
        fate = self._ask(lambda s: self._cast(s, chunk))
        while fate is None:
            reason = self._interrupted()
            if reason is None and time.monotonic() > deadline:
                missing = self.missing(chunk)
                reason = (
                    f"rank {self._rank} waited {self._timeout:g} s for ranks {missing} to stage"
                )
            if reason is not None:
                return self._fate(self._propose(chunk, f"abort: {reason}"))
            fate = self._ask(lambda s: self._await_fate(s, chunk))
        return self._fate(fate)

    def abort(self, chunk: int, reason: str) -> str:
        """Refuse a chunk that this rank has not voted for.

        Returns:
            The reason that holds, this one or an earlier one.

        Raises:
            ExchangeLost: when the store is gone.
        """
        found = self._fate(self._propose(chunk, f"abort: {reason}")) or reason
        self._departure.leave()
        return found

    def stay(self) -> None:
        """Wait, where this process holds the store, until all ranks know the last chunk's fate.

        The process may end then.
        """
        self._departure.leave()
        self._departure.stay(self._interrupted)

    def missing(self, chunk: int) -> list[int]:
        """Return the ranks that have not voted for the chunk."""
        return self._ask(self._votes(chunk).missing)

    def survivors(self, grace: float) -> tuple[int, ...]:
        """Register as alive and learn who else is, the same answer for all; for after an abort.

        Args:
            grace: seconds in which ranks must have registered, counted from the first that asks. A
                rank that comes later is told.

        Raises:
            ExchangeLost: when the store is gone, or the others have gone on without this rank.
        """
        waits = self._ask(lambda s: self._alive.add(s, self._rank))
        deadline = time.monotonic() + grace
        while waits and time.monotonic() < deadline and not self._ask(lambda s: s.check(["live"])):
            time.sleep(0.002)
            waits = self._ask(self._alive.incomplete)
        alive = self._ask(self._alive.present)
        live = self._live(alive)
        self._part_with(live)
        if self._rank not in live:
            raise ExchangeLost(
                f"ranks {list(live)} went on without rank {self._rank}, which answered too late: "
                "stop this rank"
            )
        return live

    def _live(self, alive: list[int]) -> tuple[int, ...]:
        """Return who is alive, as the first has seen it that asks."""
        said = self._ask(lambda s: s.compare_set("live", "", json.dumps(alive)))
        return tuple(json.loads(said.decode()))

    def _part_with(self, live: tuple[int, ...]) -> None:
        """Wait, where this process holds the store, until all who are alive know who is.

        Though this rank be none of them.
        """
        self._departure.over()
        known = Departure(self._store, self._held, self._rank, live, self._timeout, "who is alive")
        known.begin()
        known.leave()
        known.stay()

    def forget(self, chunks: int) -> None:
        """Delete this rank's keys of an exchange that every rank has ended.

        The lowest rank deletes those of all.

        Args:
            chunks: how many the exchange had.
        """
        keys = [f"entered/{self._rank}"]
        if self._rank == min(self._ranks):
            keys += ["plan", *self._departure.keys()]
            for chunk in range(MEETING, chunks):
                keys += [f"fate/{chunk}", *self._votes(chunk).keys]
        self._ask(lambda s: [s.delete_key(key) for key in keys])

    def _votes(self, chunk: int) -> Roll:
        return Roll(f"vote/{chunk}", self._ranks)

    def _cast(self, store: Any, chunk: int) -> str | None:
        """Vote and wait a while for the chunk's fate.

        All of it is one job of the store's thread: each hand-over takes as long as the answer.
        """
        if self._votes(chunk).add(store, self._rank):
            return self._await_fate(store, chunk)
        return store.compare_set(f"fate/{chunk}", "", "commit").decode()

    def _await_fate(self, store: Any, chunk: int) -> str | None:
        """Return the chunk's fate; None when it is not decided within a slice of time."""
        key = f"fate/{chunk}"
        return store.get(key).decode() if appears(store, key, self._timeout) else None

    def _propose(self, chunk: int, fate: str) -> str:
        return self._ask(lambda s: s.compare_set(f"fate/{chunk}", "", fate)).decode()

    @staticmethod
    def _fate(written: str) -> str | None:
        return None if written == "commit" else written.removeprefix("abort: ")

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        try:
            return self._store.ask(call)
        except RuntimeError as error:
            raise _lost(error) from error


def _lost(error: Exception) -> ExchangeLost:
    return ExchangeLost(
        f"the store that exchanges are agreed on does not answer ({str(error).splitlines()[0]}): "
        "what the other ranks have committed cannot be known; stop this rank and load its "
        "weights anew"
    )
