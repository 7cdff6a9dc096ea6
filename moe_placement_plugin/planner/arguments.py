"""Check what the planner is given, and bring it into the arrays that the kernels want."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..core.errors import PlacementError
from .figures import Windows
from .fresh.replicate import MAX_EXPERTS
from .kernels.evaluate import missing_expert
from .kernels.state import Ranks, make_ranks
from .options import MoveBudget

_SLOWNESS_SCALE = 1 << 20


def as_ranks(
    slots_per_rank: ArrayLike,
    node_of_rank: ArrayLike | None = None,
    speed: ArrayLike | None = None,
) -> Ranks:
    """Check and convert the description of the ranks.

    Args:
        slots_per_rank: int [ranks], 0 for a rank that is down.
        node_of_rank: int [ranks]; all on one node when left out.
        speed: float [ranks], relative; equal when left out.

    Raises:
        PlacementError: for negative or fractional slots, no slots at all, or arrays of another
            length.
    """
    slots = np.asarray(slots_per_rank)
    whole = slots.ndim == 1 and slots.size > 0 and np.issubdtype(slots.dtype, np.integer)
    if not whole or (slots < 0).any():
        raise PlacementError(
            f"slots_per_rank {slots_per_rank!r}: give one whole number per rank, "
            "0 for a rank that is down"
        )
    slots = slots.astype(np.int64)
    if slots.sum() == 0:
        raise PlacementError(f"slots_per_rank {slots.tolist()}: at least one rank must have slots")
    return make_ranks(slots, _as_nodes(node_of_rank, slots.size), *_as_speeds(speed, slots.size))


def _as_nodes(node_of_rank: ArrayLike | None, ranks: int) -> np.ndarray:
    """Return the node of each rank, int64 [ranks]."""
    if node_of_rank is None:
        return np.zeros(ranks, np.int64)
    nodes = np.asarray(node_of_rank, dtype=np.int64)
    if nodes.shape != (ranks,) or nodes.min() < 0:
        raise PlacementError(
            f"node_of_rank {nodes.tolist()}: give the node of each of the {ranks} ranks, "
            "numbered from 0"
        )
    return nodes


def _as_speeds(speed: ArrayLike | None, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the speed and slowness of each rank, float64 and int64 [ranks], see `Ranks`."""
    if speed is None:
        return np.ones(ranks), np.ones(ranks, np.int64)
    pace = np.array(speed, dtype=np.float64)
    if pace.shape != (ranks,) or not np.isfinite(pace).all() or (pace <= 0).any():
        raise PlacementError(
            f"speed {pace.tolist()}: give a positive relative speed for each of the {ranks} ranks; "
            "a rank that is down gets no slots"
        )
    if (pace == pace[0]).all():
        return np.ones(ranks), np.ones(ranks, np.int64)
    return pace, np.maximum(np.rint(_SLOWNESS_SCALE * pace.min() / pace), 1).astype(np.int64)


def as_windows(load: ArrayLike, window_weights: ArrayLike | None = None) -> Windows:
    """Check and copy a load; [layers, experts] counts as one window.

    Args:
        load: int or float [windows, layers, experts] or [layers, experts].
        window_weights: float [windows]; equal when left out.

    Raises:
        PlacementError: for another shape, more experts than a plan can number, negative or
            non-finite counts, or weights that are none.
    """
    array = np.asarray(load)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise PlacementError(
            f"a load of shape {np.shape(load)}: it must be [windows, layers, experts] or "
            "[layers, experts], not empty"
        )
    if array.shape[2] > MAX_EXPERTS:
        raise PlacementError(
            f"{array.shape[2]} experts per layer: the planner takes at most {MAX_EXPERTS}"
        )
    if array.dtype.kind not in "iuf":
        raise PlacementError(f"a load of {array.dtype}: counts must be integers or floats")
    # A copy always: a plan measures itself on it later.
    array = np.array(array, dtype=np.float64, order="C")
    # One pass finds both: NaN and negative counts fail the first comparison, infinities the second.
    low, high = array.min(), array.max()
    if not (low >= 0 and high < np.inf):
        raise PlacementError(
            f"a load with counts from {low} to {high}: counts must be finite and not negative; "
            "record again"
        )
    return Windows(array, _as_weights(window_weights, array.shape[0]))


def _as_weights(window_weights: ArrayLike | None, num_windows: int) -> np.ndarray:
    """Return what each window counts for, float64 [windows], adding up to 1."""
    if window_weights is None:
        return np.full(num_windows, 1.0 / num_windows)
    weights = np.asarray(window_weights, dtype=np.float64)
    valid = weights.shape == (num_windows,) and np.isfinite(weights).all()
    if not valid or weights.min() < 0 or weights.sum() == 0:
        raise PlacementError(
            f"window_weights {window_weights!r} for {num_windows} windows: "
            "give one weight of 0 or more per window"
        )
    return weights / weights.sum()


def check_fits(num_experts: int, ranks: Ranks) -> None:
    """Raise PlacementError where the slots cannot hold every expert."""
    if ranks.num_slots < num_experts:
        raise PlacementError(
            f"{ranks.num_slots} slots for {num_experts} experts: every expert needs a slot; "
            "give the ranks more slots"
        )


def as_old(old: ArrayLike, shape: tuple[int, int], ranks: Ranks) -> np.ndarray:
    """Check and copy the placement in service.

    Args:
        old: int [layers, slots].
        shape: (layers, experts) of the load.
        ranks: the ranks.

    Returns:
        int32 [layers, slots].

    Raises:
        PlacementError: for another shape, or a layer that lacks an expert.
    """
    layers, experts = shape
    table = np.array(old, dtype=np.int32, order="C")
    if table.shape != (layers, ranks.num_slots):
        raise PlacementError(
            f"an old placement of shape {table.shape} for {layers} layers of {ranks.num_slots} "
            "slots: give the one in service"
        )
    if table.min() < 0 or table.max() >= experts:
        raise PlacementError(
            f"an old placement with experts {table.min()} to {table.max()}: "
            f"experts are numbered 0 to {experts - 1}"
        )
    layer, expert = missing_expert(table, experts)
    if expert >= 0:
        raise PlacementError(
            f"an old placement without expert {expert} in layer {layer}: every expert needs a slot"
        )
    return table


def as_budget(
    budget: MoveBudget, max_bytes: int | None, bytes_per_expert: int | None
) -> MoveBudget:
    """Check a budget, and bring a limit in bytes of one expert of one layer into it.

    Raises:
        PlacementError: for no tolerance, a cap that a fresh plan breaks, a negative limit, or bytes
            without the size of an expert.
    """
    if not budget.tolerance > 0:
        raise PlacementError(f"tolerance {budget.tolerance}: give a positive fraction, 0.01 for 1%")
    if not budget.replica_cap >= 1:
        raise PlacementError(
            f"replica_cap {budget.replica_cap}: a plan cannot keep replicas smaller than the best "
            "one's; give 1 or more"
        )
    max_moves = budget.max_moves
    if max_bytes is not None:
        if not bytes_per_expert or bytes_per_expert < 1:
            raise PlacementError(
                "max_bytes without bytes_per_expert: give the size of one expert's weights in one "
                "layer"
            )
        limit = int(max_bytes) // int(bytes_per_expert)
        max_moves = limit if max_moves is None else min(max_moves, limit)
    if max_moves is not None and max_moves < 0:
        raise PlacementError(f"max_moves {max_moves}: give 0 or more")
    return MoveBudget(max_moves, float(budget.tolerance), float(budget.replica_cap))
