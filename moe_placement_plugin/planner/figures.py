"""Measure what a plan does to the load that it was made for."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from .kernels.evaluate import busiest_times, moved_slots
from .kernels.state import Ranks
from .result import Draft, Figures, Plan


class Windows(NamedTuple):
    """Hold the load that is planned for.

    Attributes:
        load: float64 [windows, layers, experts], tokens.
        weights: float64 [windows], adding up to 1: what each window counts for.
    """

    load: np.ndarray
    weights: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Return how many layers and experts there are."""
        _, layers, experts = self.load.shape
        return layers, experts

    @property
    def scale(self) -> np.ndarray:
        """Return what brings every window to its weight, whatever its tokens: float64 [windows]."""
        totals = self.load.sum(axis=(1, 2))
        return np.divide(self.weights, totals, out=np.zeros_like(self.weights), where=totals > 0)

    def mean(self) -> np.ndarray:
        """Return the mean of the windows by weight, each brought to the same total per layer.

        Returns:
            float64 [layers, experts]; its total is that of all tokens.
        """
        if self.load.shape[0] == 1:
            return self.load[0]
        totals = self.load.sum(axis=2, keepdims=True)
        shares = self.load / np.where(totals > 0, totals, 1.0)
        return np.ascontiguousarray(np.tensordot(self.weights, shares, 1) * totals.sum(axis=0))

    def pooled(self, most: int) -> Windows:
        """Return at most so many windows: consecutive ones are averaged by weight."""
        if self.load.shape[0] <= most:
            return self
        parts = np.array_split(np.arange(self.load.shape[0]), most)
        weights = [self.weights[part].sum() for part in parts]
        means = [
            Windows(self.load[part], self.weights[part] / weight).mean()
            for part, weight in zip(parts, weights, strict=True)
            if weight > 0
        ]
        return Windows(np.stack(means), np.array([weight for weight in weights if weight > 0]))


def _times(load: np.ndarray, ranks: Ranks, table: np.ndarray) -> np.ndarray:
    """Return the busiest rank's time, float64 [windows, layers]."""
    times = np.empty(load.shape[:2], np.float64)
    busiest_times(load, table, ranks.start, ranks.inverse_speed, times)
    return times


def _ratio(means: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return means / times, 1 where there is no load."""
    return np.divide(means, times, out=np.ones_like(means), where=times > 0)


def overall(windows: Windows, ranks: Ranks, table: np.ndarray) -> float:
    """Return the balancedness over windows and layers of a table, int32 [layers, slots]."""
    scale = windows.scale
    time = float(scale @ _times(windows.load, ranks, table).sum(axis=1))
    mean = float(scale @ windows.load.sum(axis=(1, 2))) / ranks.total_speed
    return mean / time if time > 0 else 1.0


def figures(windows: Windows, ranks: Ranks, table: np.ndarray) -> Figures:
    """Return how balanced a table, int32 [layers, slots], is."""
    scale = windows.scale
    times = _times(windows.load, ranks, table)
    means = windows.load.sum(axis=2) / ranks.total_speed
    total = _ratio(
        np.atleast_1d(scale @ means.sum(axis=1)), np.atleast_1d(scale @ times.sum(axis=1))
    )
    return Figures(
        _ratio(scale @ means, scale @ times),
        _ratio(means.sum(axis=1), times.sum(axis=1)),
        float(total[0]),
    )


def measured(windows: Windows, ranks: Ranks, draft: Draft, old: np.ndarray | None) -> Plan:
    """Return a draft as a plan that knows the load it was made for.

    Args:
        windows: the load.
        ranks: the ranks.
        draft: its table is frozen.
        old: int32 [layers, slots], the placement in service; None for none.
    """
    table = draft.table
    moved = before = None
    if old is not None:
        moved = np.empty(table.shape[0], np.int64)
        moved_slots(old, table, ranks.start, moved)
        before = overall(windows, ranks, old)
    table.setflags(write=False)
    return Plan(
        physical_to_logical=table,
        measure=partial(figures, windows, ranks, table),
        overall_before=before,
        moved=moved,
        leaving=draft.leaving,
        locality_curve=draft.locality_curve,
    )
