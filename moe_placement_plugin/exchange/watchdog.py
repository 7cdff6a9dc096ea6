"""Have an exchange that takes too long say what it waits for, and end it if told so."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..core.errors import PlacementError

logger = logging.getLogger("moe_placement_plugin")


@dataclass(frozen=True)
class WaitingFor:
    """Say what a rank is doing.

    Attributes:
        step: ``enter``, ``receive``, ``read peers``, ``read`` (the checkpoint), ``agree``,
            ``commit`` or ``end``.
        layers: indices of the chunk's layers within the model.
        round: of the chunk, None outside of transfers.
        peers: EP ranks that have to act: the sender and the receiver of the round, or those that
            have not voted.
        bytes: of the transfers or reads in question.
    """

    step: str
    layers: tuple[int, ...] = ()
    round: int | None = None
    peers: tuple[int, ...] = ()
    bytes: int = 0

    def __str__(self) -> str:
        layers = (
            f"layers {self.layers[0]}..{self.layers[-1]}"
            if len(self.layers) > 1
            else f"layer {self.layers[0]}"
            if self.layers
            else ""
        )
        parts = [self.step, layers, "" if self.round is None else f"round {self.round}"]
        parts += [
            f"ranks {list(self.peers)}" if self.peers else "",
            f"{self.bytes:,} bytes" if self.bytes else "",
        ]
        return ", ".join(part for part in parts if part)


class Watchdog:
    """Times an exchange; a context manager around it, or around each of its steps.

    One thread for all watchdogs of the process wakes only when a limit passes; to enter and to
    leave costs microseconds. The first limit logs a warning with what is waited for, again at each
    further multiple.

    Args:
        limit: seconds after which it warns.
        give_up: seconds after which it acts; None never.
        action: what it does then: ``raise`` interrupts the exchange, which ends with an error on
            this rank and, through the agreement, on all; ``abort`` ends the process (for
            communications that nothing interrupts).
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
            raise PlacementError(
                f"watchdog limits {limit} and {give_up} s: give a positive limit, and a give_up "
                "that is not below it"
            )
        if action not in ("raise", "abort"):
            raise PlacementError(f"watchdog action {action!r}: choose raise or abort")
        self.limit, self.give_up, self.action = limit, give_up, action
        self._report = report or logger.warning
        self.waiting = WaitingFor("start")
        self._interrupt: Callable[[], None] | None = None
        self._begin = self._warn_at = 0.0
        self.expired: str | None = None
        """What was waited for when it gave up; None while it has not."""

    def waits_for(self, waiting: WaitingFor) -> None:
        """Note what is waited for from now on."""
        self.waiting = waiting

    def watch(self, interrupt: Callable[[], None]) -> Watchdog:
        """Call ``interrupt``, from the watchdog's thread, when it gives up.

        Returns:
            The watchdog itself, for ``with``.
        """
        self._interrupt = interrupt
        return self

    def __enter__(self) -> Watchdog:
        self.expired = None
        self._begin = time.monotonic()
        self._warn_at = self._begin + self.limit
        _Monitor.of_this_process().add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _Monitor.of_this_process().remove(self)

    @property
    def _next(self) -> float:
        return (
            self._warn_at
            if self.give_up is None
            else min(self._warn_at, self._begin + self.give_up)
        )

    def _passed(self, now: float) -> bool:
        """Say that a limit has passed, and act; return whether that was the last."""
        waiting = str(self.waiting)
        if self.give_up is not None and now >= self._begin + self.give_up:
            self.expired = waiting
            what = "ending this process" if self.action == "abort" else "interrupting it"
            self._report(
                f"expert exchange not finished after {now - self._begin:.1f} s, {what}; waiting "
                f"for: {waiting}"
            )
            if self.action == "abort":
                os.abort()
            if self._interrupt is not None:
                threading.Thread(
                    target=self._interrupt, name="exchange-interrupt", daemon=True
                ).start()
            return True
        self._report(
            f"expert exchange not finished after {now - self._begin:.1f} s; waiting for: {waiting}"
        )
        self._warn_at += self.limit
        return False


class ForwardingWatchdog(Watchdog):
    """Forwards progress to an outer watchdog that times more than the exchange.

    Args:
        outer: runs already.
    """

    def __init__(self, outer: Watchdog):
        self._outer = outer
        super().__init__(outer.limit, outer.give_up, outer.action)

    @property
    def expired(self) -> str | None:
        """Return what was waited for when the outer one gave up; None while it has not."""
        return self._outer.expired

    @expired.setter
    def expired(self, value: str | None) -> None:
        pass  # the outer one knows

    def waits_for(self, waiting: WaitingFor) -> None:
        """Note what is waited for from now on."""
        super().waits_for(waiting)
        self._outer.waits_for(waiting)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Monitor:
    """Looks after all watchdogs of this process in one thread."""

    _of: tuple[int, _Monitor] | None = None

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: list[Watchdog] = []
        self._wakes_at: float | None = None
        threading.Thread(target=self._run, name="exchange-watchdog", daemon=True).start()

    @classmethod
    def of_this_process(cls) -> _Monitor:
        if (
            cls._of is None or cls._of[0] != os.getpid()
        ):  # a forked process has the object and not the thread
            cls._of = os.getpid(), cls()
        return cls._of[1]

    def add(self, watchdog: Watchdog) -> None:
        with self._changed:
            self._watched.append(watchdog)
            if self._wakes_at is None or watchdog._next < self._wakes_at:
                self._changed.notify()

    def remove(self, watchdog: Watchdog) -> None:
        with self._changed:  # which is held while it reports: nothing is said after this
            if watchdog in self._watched:
                self._watched.remove(watchdog)

    def _run(self) -> None:
        with self._changed:
            while True:
                self._wakes_at = min((w._next for w in self._watched), default=None)
                self._changed.wait(
                    None if self._wakes_at is None else max(0.0, self._wakes_at - time.monotonic())
                )
                now = time.monotonic()
                for watchdog in [w for w in self._watched if now >= w._next]:
                    if watchdog._passed(now):
                        self._watched.remove(watchdog)
