"""Let runs share a host: while one measures, no other measures, starts or stops servers.

Two pairs of GPUs that measured side by side differed by 20% between equal servers, and by 1% while
the other pair was still. Starting takes as long as measuring, and may be done by all at once.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GIVE_WAY = 1.0
"""Seconds between measuring and going on.

The next run that waits to measure takes the lock meanwhile, not this one's next start.
"""


class Quiet:
    """Hold the host: shared with other runs while this one does not measure, alone while it does.

    Args:
        file: named by all runs of the host, made if it does not exist; None when there is but one.
            It is let go when the process ends.
    """

    def __init__(self, file: Path | None):
        self.lock = None if file is None else file.open("a")
        self._hold(fcntl.LOCK_SH)

    def _hold(self, how: int) -> None:
        if self.lock is not None:
            fcntl.flock(self.lock, how)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Wait until all others are still, and keep them so."""
        self._hold(fcntl.LOCK_UN)
        self._hold(fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._hold(fcntl.LOCK_UN)
            if self.lock is not None:
                time.sleep(GIVE_WAY)
            self._hold(fcntl.LOCK_SH)
