"""Notice hosts that do not join and hosts that vanish: an error instead of a wait without end.

A rank that waits for a peer in a collective cannot be woken; when the peer's machine is gone no
connection is closed, and the wait lasts until the engine's own timeout (half an hour). So one
process of each host shows from a thread that it lives, and ends itself when another host does not
any more; the engine's own monitor then ends the rest of the host.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from ..core.errors import PlacementError, first_line

logger = logging.getLogger("moe_placement_plugin")

DEFAULT_TIMEOUT = 60.0
"""Seconds without a sign of life after which a host counts as gone."""

JOIN_TIMEOUT = 10 * DEFAULT_TIMEOUT
"""Seconds to wait for the others at start-up: ten times the timeout of a host."""

_PREFIX = "moe-placement-hosts"


def check_timeout(value: Any, flag: str = "--expert-host-timeout") -> float:
    """Turn the seconds of a flag into a number.

    Raises:
        PlacementError: when they are no number, or too few to tell a silent host from a busy one.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = float("nan")
    if not 2 <= seconds < float("inf"):
        raise PlacementError(
            f"{flag} {value}: give the seconds after which a silent host counts as gone, 2 or more"
        )
    return seconds


def end_process(message: str, log: logging.Logger = logger) -> None:
    """Log ``message`` and end this process, whatever its other threads wait for."""
    log.critical("moe_placement_plugin: %s", message)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


class HostWatch:
    """Watch the other hosts, from one process of each host.

    One thread asks the store; another one counts how often it has woken since each host last gave
    a sign. Counting wakes instead of reading a clock keeps a process that was stopped itself from
    blaming the others.

    Args:
        store: a connection of the watch's own to a store that all hosts share (``Store.clone``).
        host: index of this host.
        names: of all hosts, for messages.
        store_host: index of the host whose process holds the store.
        timeout: seconds without a sign after which a host counts as gone.
        end: called once, from a thread, with the reason.
    """

    def __init__(
        self,
        store: Any,
        host: int,
        names: Sequence[str],
        store_host: int = 0,
        timeout: float = DEFAULT_TIMEOUT,
        end: Callable[[str], None] = end_process,
    ):
        from torch.distributed import PrefixStore

        self._store = PrefixStore(_PREFIX, store)
        self._host, self._names, self._store_host = host, tuple(names), store_host
        self.timeout, self.interval = timeout, timeout / 10
        self._end = end
        self._signs: dict[int, bytes] = {}
        self._silent = dict.fromkeys((other for other in range(len(names)) if other != host), 0)
        self._unanswered = 0
        self._lost: str | None = None
        self._stop = threading.Event()

    def start(self) -> HostWatch:
        """Begin to watch, and return this watch."""
        for target, name in ((self._ask, "host-signs"), (self._count, "host-watch")):
            threading.Thread(target=target, name=name, daemon=True).start()
        return self

    def stop(self) -> None:
        """End the watch, so that this host's own end does not look like another's."""
        self._stop.set()

    def _ask(self) -> None:
        """Show that this host lives, and note the others' signs; runs in a thread."""
        number = 0
        try:
            while not self._stop.is_set():
                number += 1
                self._store.set(f"sign/{self._host}", str(number))
                for other in self._silent:
                    # A host that has not begun yet is as silent as one that is gone.
                    key = f"sign/{other}"
                    sign = self._store.get(key) if self._store.check([key]) else b""
                    if sign and sign != self._signs.get(other):
                        self._signs[other] = sign
                        self._silent[other] = 0
                self._unanswered = 0
                self._stop.wait(self.interval)
        except RuntimeError as error:
            if self._host == self._store_host:  # this process is ending, and its store with it
                self._stop.set()
            self._lost = first_line(error)

    def _count(self) -> None:
        """Count how long each host is silent, and end the process for it; runs in a thread."""
        allowed = round(self.timeout / self.interval)
        while not self._stop.wait(self.interval):
            self._unanswered += 1
            for other in self._silent:
                self._silent[other] += 1
            reason = self._reason(allowed)
            if reason is not None:
                self._stop.set()
                self._end(
                    f"{reason}. This host stops serving; start all hosts again once they reach "
                    "each other"
                )
                return

    def _reason(self, allowed: int) -> str | None:
        """Say which host is gone: one that was silent for more than ``allowed`` wakes."""
        if self._lost is not None:
            return (
                f"host {self._names[self._store_host]} has ended: its process that holds the store "
                f"closed the connection ({self._lost})"
            )
        gone = [other for other, count in self._silent.items() if count > allowed]
        if self._unanswered > allowed:
            # Without the store nothing is known of the others either.
            gone = [self._store_host] if self._store_host != self._host else gone
        if gone:
            names = "; ".join(self._names[other] for other in gone)
            return (
                f"host {names} gave no sign of life for {self.timeout:g} s: it, or the network to "
                "it, is down"
            )
        return None


class JoinWatch:
    """Say what the engine's own wait for all ranks waits for, and end it when a host does not come.

    Args:
        what: what is waited for, for messages: the address and the hosts.
        timeout: seconds.
        end: called with the reason.
        report: takes a reminder every `every` seconds.
    """

    every = 30.0
    """Seconds between two reminders."""

    def __init__(
        self,
        what: str,
        timeout: float = JOIN_TIMEOUT,
        end: Callable[[str], None] = end_process,
        report: Callable[[str], None] = logger.warning,
    ):
        self._what, self._timeout, self._end, self._report = what, timeout, end, report
        self._done = threading.Event()

    def __enter__(self) -> JoinWatch:
        threading.Thread(target=self._run, name="host-join", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()

    def _run(self) -> None:
        began = time.monotonic()
        while True:
            left = began + self._timeout - time.monotonic()
            if self._done.wait(max(0.0, min(self.every, left))):
                return
            waited = time.monotonic() - began
            if waited >= self._timeout:
                self._end(
                    f"waited {self._timeout:g} s for {self._what}, and not all ranks have joined. "
                    "Start the engine on every host with the same flags; a host that stopped at "
                    "once says why in its own log (without this plugin: invalid choice for "
                    "--expert-placement-strategy, or unrecognized arguments)"
                )
                return
            self._report(
                f"moe_placement_plugin: still waiting for {self._what} after {waited:.0f} s"
            )


def own_connection(store: Any, timeout: float) -> Any:
    """Open a further connection to the store, for a thread that must not wait behind the process.

    Args:
        store: of the process group.
        timeout: seconds for connecting.
    """
    clone = store.clone()
    clone.set_timeout(timedelta(seconds=timeout))
    return clone
