"""Keep the process that holds an exchange's store until the others know how the exchange ended.

Most stores live in the process of a rank. When that rank casts the last vote it knows the fate
first: were its process to end then, the others would find the store closed and could never know
that a chunk is committed. So every rank says that it knows the end, and the one with the store
waits for that, at most for the exchange's timeout, since a rank that has died will never say it.

It waits where `Exchange.run` ends, so that the process may be ended in any way afterwards. After an
abort it does not, because the dead are not worth waiting for then and `survivors` must not come too
late: it waits at the end of that, or else where the process ends by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import util
from typing import Any

from ..hosts.bounded_store import BoundedStore
from .roll import Roll

logger = logging.getLogger("moe_placement_plugin")

SLICE = 1.0
"""Seconds that one wait for the others blocks: between two an interruption is noticed."""

LAST_ANSWER = 5.0
"""Seconds that a process which ends waits for the store's answer."""

_open: list[Departure] = []
"""Departures of this process that are not over."""


class Departure:
    """Has one rank leave the store, once it has read the last that it needs.

    Args:
        store: of the exchange.
        held: whether it ends with this process (`stores.held_here`); only then is anybody waited
            for.
        rank: this one.
        ranks: all that read; one that is not among them only waits.
        timeout: seconds that the others are waited for.
        what: they read.
    """

    def __init__(
        self, store: BoundedStore, held: bool, rank: int, ranks: Sequence[int], timeout: float,
        what: str = "how the exchange ended",
    ):  # fmt: skip
        self._store, self._held, self._rank, self._timeout = store, held, rank, timeout
        self._what, self._know = what, Roll(f"know {what}", ranks)
        self._spoken = rank not in ranks
        self._until = 0.0
        self._at_exit: util.Finalize | None = None

    def begin(self) -> None:
        """Note that the ranks need the store from now on.

        Should this process end, it says that it is gone, and with the store waits for the others.
        Nothing but the store is kept for that, and not for longer than it may be needed.
        """
        for departure in [d for d in _open if d._until < time.monotonic()]:
            departure.over()
        self.needed()
        if self._at_exit is None:
            # Not atexit, which processes of multiprocessing, and so the engines', do not run.
            self._at_exit = util.Finalize(None, self._end_of_process, exitpriority=50)
            _open.append(self)

    def needed(self) -> None:
        """Note that the others may ask the store until the timeout has passed from now."""
        self._until = time.monotonic() + self._timeout

    def leave(self, limit: float | None = None) -> None:
        """Say that this rank has read it; should the store be gone already, that does no harm.

        Args:
            limit: seconds to wait for the store's answer; as for any other when left out.
        """
        self.needed()
        if not self._spoken:
            self._spoken = True
            with suppress(RuntimeError):
                self._store.ask(self._say, limit)
        if not self._held:
            self.over()

    def stay(self, interrupted: Callable[[], str | None] = lambda: None) -> None:
        """Wait until all ranks have read it, where this process holds the store.

        Args:
            interrupted: asked while waiting; a reason ends the wait.
        """
        if not self._held:
            return
        with suppress(RuntimeError):
            while not self._store.ask(self._all_know):
                if interrupted() or time.monotonic() > self._until:
                    logger.warning(
                        "moe_placement_plugin: ranks %s have not said within %g s that they know "
                        "%s; rank %d, whose process holds the store, waits for them no longer",
                        self._store.ask(self._know.missing),
                        self._timeout,
                        self._what,
                        self._rank,
                    )
                    break
        self.over()

    def over(self) -> None:
        """Wait for nobody any more."""
        at_exit, self._at_exit = self._at_exit, None
        if at_exit is not None:
            at_exit.cancel()
            with suppress(ValueError):  # another thread's exchange has found its time passed
                _open.remove(self)

    def keys(self) -> list[str]:
        """Return the keys that this leaves in the store."""
        return [*self._know.keys, f"all know {self._what}"]

    def _end_of_process(self) -> None:
        until = self._until
        self.leave(LAST_ANSWER)
        self._until = until
        self.stay()

    def _say(self, store: Any) -> None:
        if not self._know.add(store, self._rank):
            store.set(f"all know {self._what}", "")

    def _all_know(self, store: Any) -> bool:
        return appears(store, f"all know {self._what}", self._timeout)


def appears(store: Any, key: str, timeout: float) -> bool:
    """Wait for a key, a slice of time or the timeout at most; return whether it is there.

    Raises:
        RuntimeError: when the store is gone.
    """
    from torch.distributed import DistNetworkError, DistStoreError

    try:
        store.wait([key], timedelta(seconds=min(SLICE, timeout)))
    except DistNetworkError:
        raise
    except DistStoreError:
        return False
    return True
