"""Ask a store whose answers are waited for only so long.

torch's TCPStore waits for an answer without end, its timeout notwithstanding, when the host at the
other end vanishes without closing its connections (a link that goes down, a machine that loses
power).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class StoreSilent(RuntimeError):
    """Say that the store did not answer in time: what was asked may have happened or not."""


class BoundedStore:
    """Ask a store from a thread of its own.

    After one silence all further questions are refused: the client's connection is still busy with
    the first.

    Args:
        store: a torch.distributed store.
        limit: seconds to wait for an answer.
    """

    def __init__(self, store: Any, limit: float):
        self._store, self._limit = store, limit
        self._jobs: queue.SimpleQueue[
            tuple[Callable[[Any], Any], queue.SimpleQueue[Any]] | None
        ] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._silent: str | None = None

    def ask(self, call: Callable[[Any], Any], limit: float | None = None) -> Any:
        """Return what ``call(store)`` returns.

        Args:
            call: one operation.
            limit: seconds to wait, for an operation that blocks by itself; the store's own when
                left out.

        Raises:
            StoreSilent: when it takes longer, or an earlier one did.
        """
        if self._silent is not None:
            raise StoreSilent(self._silent)
        if self._thread is None:
            # A daemon: a thread that waits for a vanished host must not keep the process alive.
            self._thread = threading.Thread(
                target=_serve, args=(self._store, self._jobs), name="bounded-store", daemon=True
            )
            self._thread.start()
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._jobs.put((call, answer))
        limit = self._limit if limit is None else limit
        try:
            error, value = answer.get(timeout=limit)
        except queue.Empty:
            self._silent = f"no answer within {limit:g} s"
            raise StoreSilent(self._silent) from None
        if error is not None:
            raise error
        return value

    def __del__(self) -> None:
        self._jobs.put(None)


def _serve(store: Any, jobs: queue.SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        call, answer = job
        try:
            answer.put((None, call(store)))
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that asked
            answer.put((error, None))
