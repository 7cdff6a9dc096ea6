"""Sum counts up in windows of time, whose number is bounded.

Windows are cut at multiples of their length in Unix time, so that the processes of one engine cut
alike without talking to each other. When there are too many, neighbours are merged and the length
doubles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.events import event_counts
from ..core.load import ExpertLoad

MAX_WINDOWS = 64
"""Windows of time that a file holds before neighbours merge; each may hold prefill and decode."""


class Windows:
    """Hold counts per window of time and phase.

    Args:
        layer_ids: index of each layer within the model, ``[layers]``.
        num_experts: logical experts per layer.
        length: of a window, in seconds; grows by doubling.
        metadata: facts that go into the file.

    Attributes:
        counts: index of a window (its start / `length`) and phase -> ``[layers, experts]``.
        pairs: co-activation ``[layers, experts, experts]``, None until some was added.
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
            self._add(math.floor(when / self.length), phase, counts)
            while len({index for index, _ in self.counts}) > MAX_WINDOWS:
                self._lengthen(self.length * 2)

    def add_pairs(self, pairs: np.ndarray) -> None:
        """Add co-activation ``[layers, experts, experts]``."""
        self.pairs = pairs if self.pairs is None else self.pairs + pairs

    def _add(self, index: int, phase: str, counts: np.ndarray) -> None:
        known = self.counts.get((index, phase))
        self.counts[index, phase] = counts if known is None else known + counts

    def _lengthen(self, length: float) -> None:
        """Merge windows into those of a greater length."""
        old, old_length = self.counts, self.length
        self.counts, self.length = {}, length
        for (index, phase), counts in old.items():
            self._add(math.floor((index + 0.5) * old_length / length), phase, counts)

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
                key: spread_rows(counts, mine, len(layers)) for key, counts in self.counts.items()
            }
            self.pairs = None if self.pairs is None else spread_rows(self.pairs, mine, len(layers))
            self.layer_ids = layers
        for start, phase, counts in zip(starts, load.phases, load.counts):
            self.add(start + length / 2, phase, spread_rows(counts, theirs, len(layers)))
        if load.coactivation is not None:
            self.add_pairs(spread_rows(load.coactivation, theirs, len(layers)))

    def load(self) -> ExpertLoad:
        """Return the recording so far; one window per phase that saw tokens.

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
        return ExpertLoad(
            counts=np.stack([self.counts[key] for key in keys]),
            layer_ids=self.layer_ids,
            phases=tuple(phase for _, phase in keys),
            coactivation=self.pairs,
            metadata=metadata,
        )


def spread_rows(rows: np.ndarray, places: list[int], size: int) -> np.ndarray:
    """Put ``rows`` at ``places`` among ``size`` rows, the others being 0."""
    if places == list(range(size)):
        return rows
    result = np.zeros((size, *rows.shape[1:]), dtype=rows.dtype)
    result[places] = rows
    return result
