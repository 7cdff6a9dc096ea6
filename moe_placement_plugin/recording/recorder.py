"""Write counters to a recording on disk, from a background thread of each process.

Every interval the whole file is replaced atomically, and a moment after the last batch of an engine
that has become idle: servers kill their workers when they are stopped. What a crash under load
loses is the interval that was running.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..formats.atomic import remove_unfinished
from ..formats.load_file import read_load
from ..formats.plan_or_load import write
from .counters import PHASES
from .windows import Windows as Windows
from .windows import spread_rows

logger = logging.getLogger("moe_placement_plugin")

DEFAULT_INTERVAL = 60.0
"""Seconds between two writes."""

IDLE = 1.0
"""Seconds without a batch after which what is left is written."""

Snapshot = Callable[[], tuple[np.ndarray, np.ndarray | None]]
"""Returns the counts so far, ``[phases, layers, experts]``, and co-activation or None."""


def part_path(path: str | Path, part: int) -> Path:
    """Say where process number ``part`` writes; number 0 writes the recording itself."""
    return Path(path) if part == 0 else Path(f"{path}.part-{part}")


def check_path(path: str | Path, shape: tuple[int, int] | None = None) -> None:
    """Refuse a path that cannot be written or that holds no recording of this model.

    Args:
        path: the recording to be.
        shape: (layers, experts) of the model, when known.

    Raises:
        PlacementError: naming the path and the mend.
    """
    path = Path(path)
    if path.is_dir():
        raise PlacementError(
            f"--expert-load-record {path} is a directory: give the path of a file in it"
        )
    if not path.parent.is_dir():
        raise PlacementError(
            f"--expert-load-record {path}: directory {path.parent} does not exist: make it, or "
            "give another path"
        )
    if not os.access(path.parent, os.W_OK):
        raise PlacementError(
            f"--expert-load-record {path}: directory {path.parent} cannot be written: give a "
            "writable path"
        )
    if path.exists():
        try:
            load = read_load(path)
        except PlacementError as error:
            raise PlacementError(
                f"--expert-load-record {path} exists and is no recording ({error}): give another "
                "path or remove the file"
            ) from None
        if "window_start" not in load.metadata or (
            shape is not None and (load.num_layers, load.num_experts) != shape
        ):
            raise PlacementError(
                f"--expert-load-record {path} exists and is the recording of another model "
                f"({load.num_layers} layers x {load.num_experts} experts): give another path or "
                "remove the file"
            )


def check_interval(seconds: Any) -> float:
    """Turn the interval of a flag into a number.

    Raises:
        PlacementError: when it is no number, or too short to write files at.
    """
    try:
        value = float(seconds)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.1 <= value < math.inf:
        raise PlacementError(
            f"--expert-load-interval {seconds}: give seconds between two writes, 0.1 or more"
        )
    return value


class LoadRecorder:
    """Write one process's counters at an interval, from a thread of its own.

    Process 0 writes the recording; others write parts beside it (data-parallel ranks see other
    tokens, pipeline stages other layers), which process 0 adds in. An existing recording of the
    same model is continued.

    Args:
        path: the recording.
        windows: empty windows with this process's layers.
        snapshot: returns the counts so far.
        interval: seconds between two writes.
        part: number of this process among those that count.
        num_parts: how many of them there are.
    """

    def __init__(
        self,
        path: str | Path,
        windows: Windows,
        snapshot: Snapshot,
        interval: float,
        part: int = 0,
        num_parts: int = 1,
    ):
        self.path, self.part = Path(path), part
        # What process 0 adds in.
        self._others = (
            [part_path(path, other) for other in range(1, num_parts)] if part == 0 else []
        )
        self.windows = windows
        self.interval = interval
        self._layer_ids = windows.layer_ids
        windows.metadata["interval"] = interval
        self._snapshot = snapshot
        self._seen: tuple[np.ndarray, np.ndarray | None] | None = None
        self._served = False
        self._batch = 0.0
        self._unsaved = False
        self._added: list[int] = []
        self._warned = False
        self._empty = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        remove_unfinished(part_path(path, part))
        if part:
            part_path(path, part).unlink(missing_ok=True)
        else:
            self._continue_recording()

    def _continue_recording(self) -> None:
        """Remove parts of an earlier run, and take over what it recorded of the same model."""
        for stale in glob.glob(f"{glob.escape(str(self.path))}.part-*"):
            Path(stale).unlink(missing_ok=True)
        if self.path.exists():
            try:
                self.windows.merge(read_load(self.path))
            except PlacementError as error:
                logger.warning(
                    "expert load: %s is not continued, it will be replaced (%s)", self.path, error
                )

    def served(self) -> None:
        """Note that a batch of real requests is about to run; the first one starts the thread.

        Not earlier: other threads must leave CUDA alone while graphs are captured at start-up.
        """
        self._batch, self._unsaved = time.monotonic(), True
        if not self._served:
            self._served = True
            self._thread = threading.Thread(
                target=self._run, name="expert-load-recorder", daemon=True
            )
            self._thread.start()
            # Engine processes end through multiprocessing, which does not run atexit handlers.
            util.Finalize(self, self.close, exitpriority=100)

    def _run(self) -> None:
        end = self._window_end()
        while not self._stop.wait(max(0.0, min(end - time.time(), IDLE))):
            if time.time() >= end:
                self.flush()
                end = self._window_end()
            elif time.monotonic() - self._batch > IDLE and (
                self._unsaved or self._others_written() != self._added
            ):
                self.flush(running=True)

    def _window_end(self) -> float:
        now = time.time()
        return now + self.interval - now % self.interval

    def close(self) -> None:
        """Write what is left and end the thread."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        self.flush()
        if self._others:
            # The other processes are ending too; their last parts are a moment away.
            time.sleep(0.3)
            self.flush()

    def flush(self, running: bool = False) -> None:
        """Write the counts since the last flush.

        Whatever goes wrong is one warning, never the engine's end.

        Args:
            running: they belong to the window that is running, not to the one that has just ended.
        """
        with self._lock:
            try:
                self._unsaved = False
                new = self._collect(running)
                if new or self._others:
                    self._write()
                if new:
                    # A batch that is under way was counted in part: all is saved once nothing new
                    # was found.
                    self._unsaved = True
                self._warned = False
            except Exception as error:  # noqa: BLE001 - recording must never end a server
                if not self._warned:
                    logger.warning(
                        "expert load: %s; the server goes on, recording tries again every %g s",
                        error,
                        self.interval,
                    )
                self._warned = True

    def _collect(self, running: bool) -> bool:
        """Add what was counted since the last time to the windows; tell whether that is any."""
        counts, pairs = self._snapshot()
        if self._served and not running and not counts.any():
            self._empty += 1
            # The second time: the first may fall between the beginning of the first forward pass
            # and its first layer.
            if self._empty == 2:
                logger.warning(
                    "expert load: requests are served but no routing is seen, because the MoE "
                    "kernel in use chooses experts by itself: choose another one, such as "
                    "--moe-backend triton (vLLM) or --moe-runner-backend triton (SGLang)"
                )
        before, pairs_before = self._seen or (np.zeros_like(counts), None)
        if self._seen is not None and np.array_equal(counts, before) and not self._warned:
            return False
        rows = [self.windows.layer_ids.index(i) for i in self._layer_ids]
        size = len(self.windows.layer_ids)
        # A flush at a boundary closes the window that ends there.
        when = time.time() - (0 if running else self.interval / 2)
        for phase, delta in zip(PHASES, counts - before):
            self.windows.add(when, phase, spread_rows(delta, rows, size))
        if pairs is not None:
            delta = pairs - (0 if pairs_before is None else pairs_before)
            self.windows.add_pairs(spread_rows(delta, rows, size))
        self._seen = counts, pairs
        return True

    def _write(self) -> None:
        """Write the windows; process 0 adds the other processes' parts."""
        total = self.windows
        if self._others:
            total = Windows(total.layer_ids, total.num_experts, total.length, total.metadata)
            if self.windows.counts:
                total.merge(self.windows.load())
            self._added = self._others_written()
            for path in self._others:
                if path.exists():
                    total.merge(read_load(path))
        if total.counts:
            write(total.load(), part_path(self.path, self.part))

    def _others_written(self) -> list[int]:
        """Give when each of the other processes' parts was written; 0 for one that is not there."""
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in self._others]
