"""An exchange that takes too long says what it waits for, and is ended if told so; it never hangs in silence."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..errors import PlacementError

logger = logging.getLogger("moe_placement_plugin")


@dataclass(frozen=True)
class WaitingFor:
    """What a rank is doing.

    Attributes:
        step: ``receive``, ``read``, ``agree`` or ``commit``.
        layers: indices of the chunk's layers within the model.
        round: of the chunk, None outside of transfers.
        peers: EP ranks that have to act: the sender and the receiver of the round, or those that have not voted.
        bytes: of the transfers or reads in question.
    """

    step: str
    layers: tuple[int, ...] = ()
    round: int | None = None
    peers: tuple[int, ...] = ()
    bytes: int = 0

    def __str__(self) -> str:
        layers = f"layers {self.layers[0]}..{self.layers[-1]}" if len(self.layers) > 1 else f"layer {self.layers[0]}" if self.layers else ""
        parts = [self.step, layers, "" if self.round is None else f"round {self.round}"]
        parts += [f"ranks {list(self.peers)}" if self.peers else "", f"{self.bytes:,} bytes" if self.bytes else ""]
        return ", ".join(part for part in parts if part)


class Watchdog:
    """Times an exchange; a context manager around it (or around each of its steps, when a server serves between them).

    A thread wakes only when a limit passes. The first limit logs a warning with what is waited for, again at each further multiple.

    Args:
        limit: seconds after which it warns.
        give_up: seconds after which it acts; None never.
        action: what it does then: ``raise`` interrupts the exchange, which ends with an error on this rank and, through the agreement, on all;
            ``abort`` ends the process (for communications that nothing interrupts).
        report: takes each warning; logs when left out.

    Raises:
        PlacementError: when the limits make no sense.
    """

    def __init__(
        self,
        limit: float = 30.0,
        give_up: float | None = None,
        action: Literal["raise", "abort"] = "raise",
        report: Callable[[str], None] | None = None,
    ):
        if limit <= 0 or (give_up is not None and give_up < limit):
            raise PlacementError(f"watchdog limits {limit} and {give_up} s: give a positive limit, and a give_up that is not below it")
        if action not in ("raise", "abort"):
            raise PlacementError(f"watchdog action {action!r}: choose raise or abort")
        self.limit, self.give_up, self.action = limit, give_up, action
        self._report = report or logger.warning
        self.waiting = WaitingFor("start")
        self._interrupt: Callable[[], None] | None = None
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self.expired: str | None = None
        """What was waited for when it gave up; None while it has not."""

    def waits_for(self, waiting: WaitingFor) -> None:
        """Note what is waited for from now on."""
        self.waiting = waiting

    def watch(self, interrupt: Callable[[], None]) -> Watchdog:
        """Call ``interrupt``, from the watchdog's thread, when it gives up; returns itself, for ``with``."""
        self._interrupt = interrupt
        return self

    def __enter__(self) -> Watchdog:
        self.expired = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop, time.monotonic()), name="exchange-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self, stop: threading.Event, begin: float) -> None:
        warn_at = begin + self.limit
        end_at = None if self.give_up is None else begin + self.give_up
        while True:
            until = warn_at if end_at is None else min(warn_at, end_at)
            if stop.wait(max(0.0, until - time.monotonic())):
                return
            now = time.monotonic()
            waiting = str(self.waiting)
            if end_at is not None and now >= end_at:
                self.expired = waiting
                what = "ending this process" if self.action == "abort" else "interrupting it"
                self._report(f"expert exchange not finished after {now - begin:.1f} s, {what}; waiting for: {waiting}")
                if self.action == "abort":
                    os.abort()
                if self._interrupt is not None:
                    self._interrupt()
                return
            if now >= warn_at:
                self._report(f"expert exchange not finished after {now - begin:.1f} s; waiting for: {waiting}")
                warn_at += self.limit
