"""Hold what the planner answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class LocalityPoint:
    """Hold one plan of the trade-off between balance and load that stays on its home node.

    Attributes:
        balancedness: mean rank time over busiest rank time, 0..1.
        leaving: share of the load that is served off its home node, 0..1.
    """

    balancedness: float
    leaving: float


class Draft(NamedTuple):
    """Hold a plan that nobody has measured yet; the fields of `Plan` with the same names.

    Attributes:
        table: int32 [layers, slots].
        leaving: for plans with groups.
        locality_curve: for soft plans.
    """

    table: np.ndarray
    leaving: float | None = None
    locality_curve: tuple[LocalityPoint, ...] = ()


class Figures(NamedTuple):
    """Say how balanced a plan is: the fields of `Plan` with the same names."""

    balancedness: np.ndarray
    window_balancedness: np.ndarray
    overall: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Place every layer's experts, and say what that is expected to do.

    The figures of balance are measured when first asked for, on a copy of the load that the plan
    keeps: a serving loop that only wants the placement does not wait for them.

    Attributes:
        physical_to_logical: int32 [layers, slots], the expert of each slot; slots are numbered rank
            after rank.
        measure: computes the figures of balance.
        balancedness: float64 [layers]: mean rank time over busiest rank time on the load that was
            planned for, summed over windows.
        window_balancedness: float64 [windows], the same per window, summed over layers.
        overall: the same, summed over windows and layers.
        overall_before: of the old placement on the same load; None without one.
        moved: int64 [layers], slots whose rank has to fetch the expert; None without an old
            placement.
        leaving: share of the load served off its home node, for plans with groups; else None.
        locality_curve: the trade-off that a soft plan was chosen from; empty otherwise.
    """

    physical_to_logical: np.ndarray
    measure: Callable[[], Figures] = field(repr=False)
    overall_before: float | None = None
    moved: np.ndarray | None = None
    leaving: float | None = None
    locality_curve: tuple[LocalityPoint, ...] = ()

    @cached_property
    def _figures(self) -> Figures:
        """Measure once."""
        return self.measure()

    @property
    def balancedness(self) -> np.ndarray:
        """Return the balancedness of each layer."""
        return self._figures.balancedness

    @property
    def window_balancedness(self) -> np.ndarray:
        """Return the balancedness of each window."""
        return self._figures.window_balancedness

    @property
    def overall(self) -> float:
        """Return the balancedness over windows and layers."""
        return self._figures.overall

    @property
    def moved_slots(self) -> int:
        """Return the slots that move, over all layers; 0 without an old placement."""
        return 0 if self.moved is None else int(self.moved.sum())

    @property
    def gain(self) -> float:
        """Return the balancedness gained over the old placement; 0 without one."""
        return 0.0 if self.overall_before is None else self.overall - self.overall_before

    @property
    def speedup(self) -> float:
        """Return the time of the busiest ranks before over after; 1 without an old placement."""
        return self.overall / self.overall_before if self.overall_before else 1.0
