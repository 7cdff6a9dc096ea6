"""From counters to a recording on disk: windows, a background thread, the files of several processes.

Windows are cut at multiples of their length in Unix time, so that the processes of one engine cut alike
without talking to each other. The file is bounded: when it holds too many windows, neighbours are merged and
the length doubles. Every interval the whole file is replaced atomically, and a moment after the last batch of an engine that has
become idle: servers kill their workers when they are stopped. What a crash under load loses is the interval that was running.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.events import event_counts
from ..core.load import ExpertLoad
from ..formats.atomic import remove_unfinished
from ..formats.load_file import read_load
from ..formats.plan_or_load import write
from .counters import PHASES

logger = logging.getLogger("moe_placement_plugin")

DEFAULT_INTERVAL = 60.0
MAX_WINDOWS = 64
"""Windows of time that a file holds before neighbours are merged (each may hold prefill and decode)."""

IDLE = 1.0
"""Seconds without a batch after which what is left is written."""

Snapshot = Callable[[], tuple[np.ndarray, np.ndarray | None]]


class Windows:
    """Counts per window of time and phase.

    Args:
        layer_ids: index of each layer within the model, ``[layers]``.
        num_experts: logical experts per layer.
        length: of a window, in seconds; grows by doubling.
        metadata: facts that go into the file.
    """

    def __init__(
        self, layer_ids: Sequence[int], num_experts: int, length: float, metadata: Mapping[str, Any]
    ):
        self.layer_ids = tuple(layer_ids)
        self.num_experts = num_experts
        self.length = length
        self.metadata = dict(metadata)
        self.counts: dict[tuple[int, str], np.ndarray] = {}
        self.pairs: np.ndarray | None = None

    def add(self, when: float, phase: str, counts: np.ndarray) -> None:
        """Add counts ``[layers, experts]`` that arose at Unix time ``when``."""
        if counts.any():
            key = (math.floor(when / self.length), phase)
            self.counts[key] = self.counts[key] + counts if key in self.counts else counts
            while len({index for index, _ in self.counts}) > MAX_WINDOWS:
                self._lengthen(self.length * 2)

    def _lengthen(self, length: float) -> None:
        old, old_length = self.counts, self.length
        self.counts, self.length = {}, length
        for (index, phase), counts in old.items():
            key = (math.floor((index + 0.5) * old_length / length), phase)
            self.counts[key] = self.counts[key] + counts if key in self.counts else counts

    def merge(self, load: ExpertLoad) -> None:
        """Add the windows of a recording of the same model, whose layers may be others.

        Raises:
            PlacementError: when it has other experts, or was not written by a recorder.
        """
        starts = load.metadata.get("window_start")
        if (
            load.num_experts != self.num_experts
            or not isinstance(starts, list)
            or len(starts) != load.num_windows
        ):
            raise PlacementError("it was recorded on another model or by another tool")
        length = float(load.metadata["window_seconds"])
        if length > self.length:
            self._lengthen(length)
        layers = tuple(sorted({*self.layer_ids, *load.layer_ids}))
        mine, theirs = ([layers.index(i) for i in ids] for ids in (self.layer_ids, load.layer_ids))
        if layers != self.layer_ids:
            self.counts = {
                key: _spread(counts, mine, len(layers)) for key, counts in self.counts.items()
            }
            self.pairs = None if self.pairs is None else _spread(self.pairs, mine, len(layers))
            self.layer_ids = layers
        for start, phase, counts in zip(starts, load.phases, load.counts):
            self.add(start + length / 2, phase, _spread(counts, theirs, len(layers)))
        if load.coactivation is not None:
            pairs = _spread(load.coactivation, theirs, len(layers))
            self.pairs = pairs if self.pairs is None else self.pairs + pairs

    def load(self) -> ExpertLoad:
        """The recording so far; one window per phase that saw tokens.

        Raises:
            PlacementError: when there is none yet.
        """
        keys = sorted(self.counts)
        if not keys:
            raise PlacementError(
                "the recording is empty (no token in any layer): record while requests are served"
            )
        metadata = self.metadata | {
            "window_start": [index * self.length for index, _ in keys],
            "window_seconds": self.length,
            "events": event_counts(),
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        counts = np.stack([self.counts[key] for key in keys])
        return ExpertLoad(
            counts, self.layer_ids, tuple(phase for _, phase in keys), self.pairs, metadata
        )


def _spread(rows: np.ndarray, places: list[int], size: int) -> np.ndarray:
    if places == list(range(size)):
        return rows
    result = np.zeros((size, *rows.shape[1:]), dtype=rows.dtype)
    result[places] = rows
    return result


def part_path(path: str | Path, part: int) -> Path:
    """Where the process number ``part`` writes; number 0 writes the recording itself."""
    return Path(path) if part == 0 else Path(f"{path}.part-{part}")


def check_path(path: str | Path, shape: tuple[int, int] | None = None) -> None:
    """Refuse a path that cannot be written or that holds something other than this model's recording.

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
            f"--expert-load-record {path}: directory {path.parent} does not exist: make it, or give another path"
        )
    if not os.access(path.parent, os.W_OK):
        raise PlacementError(
            f"--expert-load-record {path}: directory {path.parent} cannot be written: give a writable path"
        )
    if path.exists():
        try:
            load = read_load(path)
        except PlacementError as error:
            raise PlacementError(
                f"--expert-load-record {path} exists and is no recording ({error}): give another path or remove the file"
            ) from None
        if "window_start" not in load.metadata or (
            shape is not None and (load.num_layers, load.num_experts) != shape
        ):
            raise PlacementError(
                f"--expert-load-record {path} exists and is the recording of another model ({load.num_layers} layers x "
                f"{load.num_experts} experts): give another path or remove the file"
            )


def check_interval(seconds: Any) -> float:
    """The interval as a number.

    Raises:
        PlacementError: when it is none, or too short to write files at.
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
    """Writes one process's counters at an interval, from a thread of its own.

    Process 0 writes the recording; others write parts beside it (data-parallel ranks see other tokens,
    pipeline stages other layers), which process 0 adds in. An existing recording of the same model is
    continued.

    Args:
        path: the recording.
        windows: empty windows with this process's layers.
        snapshot: the counts so far, ``[phases, layers, experts]``, and co-activation.
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
        part_path(path, part).unlink(missing_ok=True) if part else self._begin()

    def _begin(self) -> None:
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
        """Called before each batch of real requests; the first call starts the thread.

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
        """Write the counts since the last flush. Whatever goes wrong is one warning, never the engine's end.

        Args:
            running: they belong to the window that is running, not to the one that has just ended.
        """
        with self._lock:
            try:
                self._unsaved = False
                new = self._collect(running)
                if new or self._others:
                    self._write()
                if new:  # a batch that is under way was counted in part: all is saved once nothing new was found
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
        counts, pairs = self._snapshot()
        if self._served and not running and not counts.any():
            self._empty += 1
            # The second time: the first may fall between the beginning of the first forward pass and its first layer.
            if self._empty == 2:
                logger.warning(
                    "expert load: requests are served but no routing is seen, because the MoE kernel in use chooses experts by itself: "
                    "choose another one, such as --moe-backend triton (vLLM) or --moe-runner-backend triton (SGLang)"
                )
        before, pairs_before = self._seen or (
            np.zeros_like(counts),
            None if pairs is None else np.zeros_like(pairs),
        )
        if self._seen is not None and np.array_equal(counts, before) and not self._warned:
            return False
        rows = [self.windows.layer_ids.index(i) for i in self._layer_ids]
        size = len(self.windows.layer_ids)
        # A flush at a boundary closes the window that ends there.
        when = time.time() - (0 if running else self.interval / 2)
        for phase, delta in zip(PHASES, counts - before):
            self.windows.add(when, phase, _spread(delta, rows, size))
        if pairs is not None:
            delta = _spread(pairs - pairs_before, rows, size)
            self.windows.pairs = delta if self.windows.pairs is None else self.windows.pairs + delta
        self._seen = counts, pairs
        return True

    def _write(self) -> None:
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
        """When each of the other processes' parts was written; 0 of one that is not there."""
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in self._others]
