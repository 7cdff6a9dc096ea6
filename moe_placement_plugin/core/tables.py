"""Check, invert and fill bare tables of expert ids, ``[layers, slots]``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from .errors import PlacementError


def as_int32_table(values: Any) -> np.ndarray:
    """Turn rows of expert ids, of a file or a caller, into int32 ``[layers, slots]``.

    Raises:
        PlacementError: when they are no such table.
    """
    try:
        table = np.asarray(values)
    except ValueError:
        raise PlacementError(
            "physical_to_logical has rows of different lengths: every layer needs the same slots"
        ) from None
    if table.ndim != 2 or 0 in table.shape:
        raise PlacementError(
            f"physical_to_logical has shape {table.shape}: it must be [layers, slots] with at "
            "least one of each"
        )
    if not np.issubdtype(table.dtype, np.integer):
        raise PlacementError(f"physical_to_logical has type {table.dtype}: expert ids are integers")
    if table.max() > np.iinfo(np.int32).max or table.min() < np.iinfo(np.int32).min:
        raise PlacementError(
            "physical_to_logical has ids beyond 32 bits: expert ids are small integers"
        )
    return np.array(table, dtype=np.int32)


def inverse_maps(
    table: np.ndarray, num_experts: int, usable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots of each expert and how many they are.

    Args:
        table: logical expert of each slot, int ``[layers, slots]``.
        num_experts: logical experts.
        usable: bool ``[slots]`` or ``[layers, slots]``, False for slots that no token may go to;
            all when left out.

    Returns:
        (int64 ``[layers, experts, most replicas]``, each expert's slots in ascending order, -1 as
        padding; int64 ``[layers, experts]``, replicas of each expert).
    """
    layers, slots = table.shape
    rows = np.arange(layers)[:, None]
    experts = table.astype(np.int64)
    if usable is not None:
        experts = np.where(usable, experts, num_experts)  # beyond the last one
    counts = np.zeros((layers, num_experts + 1), np.int64)
    np.add.at(counts, (rows, experts), 1)
    order = np.argsort(experts, axis=1, kind="stable")
    by_expert = np.take_along_axis(experts, order, axis=1)
    starts = np.cumsum(counts, axis=1) - counts
    replica = np.arange(slots) - np.take_along_axis(starts, by_expert, axis=1)
    slots_of = np.full((layers, num_experts + 1, int(counts.max())), -1, np.int64)
    slots_of[rows, by_expert, replica] = order
    counts = counts[:, :num_experts]
    return np.ascontiguousarray(slots_of[:, :num_experts, : int(counts.max())]), counts


def least_copied(copies: np.ndarray, held: Collection[int]) -> int:
    """Choose the expert with the fewest copies that a rank does not hold yet, lowest id first.

    Args:
        copies: of each logical expert, int ``[experts]``.
        held: experts of the rank.
    """
    return min((e for e in range(len(copies)) if e not in held), key=lambda e: (copies[e], e))


def shorten(values: Iterable[Any], limit: int = 12) -> str:
    """Write a list for a message, its first ``limit`` values only."""
    values = list(values)
    shown = ", ".join(str(v) for v in values[:limit])
    return f"[{shown}{', ...' if len(values) > limit else ''}]"
