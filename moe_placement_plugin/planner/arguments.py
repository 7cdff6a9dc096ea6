"""What the planner is given, checked and brought into the arrays that the kernels want."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.errors import PlacementError
from .fresh.replicate import MAX_EXPERTS
from .kernels.evaluate import missing_expert

_SLOWNESS_SCALE = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """The ranks of a plan as kernel arrays.

    Attributes:
        start: int64 [ranks + 1], first slot of each rank; a rank without slots is down.
        rank_of: int64 [slots]. node_of: int64 [ranks].
        speed: float64 [ranks], relative; inverse_speed: float64 [ranks].
        slowness: int64 [ranks], inverse speeds as integers: all 1 for equal ranks, else the slowest has 2**20.
    """

    start: np.ndarray
    rank_of: np.ndarray
    node_of: np.ndarray
    speed: np.ndarray
    inverse_speed: np.ndarray
    slowness: np.ndarray

    @property
    def num_ranks(self) -> int:
        return self.start.size - 1

    @property
    def num_slots(self) -> int:
        return int(self.start[-1])

    @property
    def num_nodes(self) -> int:
        return np.unique(self.node_of).size

    @property
    def unit(self) -> float:
        """Time at slowness 1 is this multiple of the time at an inverse speed of 1."""
        return (
            1.0
            if self.slowness.min() == self.slowness.max()
            else self.slowness.max() / self.inverse_speed.max()
        )

    @property
    def total_slowness(self) -> float:
        """Sum of 1 / slowness over the ranks that have slots: a layer's load over this is the mean time."""
        return float((1.0 / self.slowness[np.diff(self.start) > 0]).sum())

    @property
    def total_speed(self) -> float:
        """Of the ranks that have slots."""
        return float(self.speed[np.diff(self.start) > 0].sum())


def as_ranks(slots_per_rank, node_of_rank=None, speed=None) -> Ranks:
    """Check and convert the description of the ranks.

    Raises:
        PlacementError: for negative or fractional slots, no slots at all, or arrays of another length.
    """
    slots = np.asarray(slots_per_rank)
    if (
        slots.ndim != 1
        or slots.size == 0
        or not np.issubdtype(slots.dtype, np.integer)
        or (slots < 0).any()
    ):
        raise PlacementError(
            f"slots_per_rank {slots_per_rank!r}: give one whole number per rank, 0 for a rank that is down"
        )
    slots = slots.astype(np.int64)
    if slots.sum() == 0:
        raise PlacementError(f"slots_per_rank {slots.tolist()}: at least one rank must have slots")
    ranks = slots.size
    nodes = (
        np.zeros(ranks, np.int64)
        if node_of_rank is None
        else np.asarray(node_of_rank, dtype=np.int64)
    )
    if node_of_rank is not None and (nodes.shape != (ranks,) or nodes.min() < 0):
        raise PlacementError(
            f"node_of_rank {nodes.tolist()}: give the node of each of the {ranks} ranks, numbered from 0"
        )
    pace = np.ones(ranks) if speed is None else np.array(speed, dtype=np.float64)
    if speed is not None and (
        pace.shape != (ranks,) or not np.isfinite(pace).all() or (pace <= 0).any()
    ):
        raise PlacementError(
            f"speed {pace.tolist()}: give a positive relative speed for each of the {ranks} ranks; a rank that is down gets no slots"
        )
    start = np.zeros(ranks + 1, np.int64)
    np.cumsum(slots, out=start[1:])
    if speed is None or (pace == pace[0]).all():
        pace = np.ones(ranks)
        slowness = np.ones(ranks, np.int64)
    else:
        slowness = np.maximum(np.rint(_SLOWNESS_SCALE * pace.min() / pace), 1).astype(np.int64)
    return Ranks(start, np.repeat(np.arange(ranks), slots), nodes, pace, 1.0 / pace, slowness)


def as_windows(load) -> np.ndarray:
    """A copy of the load as float64 [windows, layers, experts]; [layers, experts] counts as one window.

    Raises:
        PlacementError: for another shape, more experts than a plan can number, or negative or non-finite counts.
    """
    array = np.asarray(load)
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        raise PlacementError(
            f"a load of shape {np.shape(load)}: it must be [windows, layers, experts] or [layers, experts], not empty"
        )
    if array.shape[2] > MAX_EXPERTS:
        raise PlacementError(
            f"{array.shape[2]} experts per layer: the planner takes at most {MAX_EXPERTS}"
        )
    if array.dtype.kind not in "iuf":
        raise PlacementError(f"a load of {array.dtype}: counts must be integers or floats")
    array = np.array(
        array, dtype=np.float64, order="C"
    )  # a copy always: a plan measures itself on it later
    # One pass finds both: NaN and negative counts fail the first comparison, infinities the second.
    low, high = array.min(), array.max()
    if not (low >= 0 and high < np.inf):
        raise PlacementError(
            f"a load with counts from {low} to {high}: counts must be finite and not negative; record again"
        )
    return array


def check_fits(num_experts: int, ranks: Ranks) -> None:
    """Raise PlacementError where the slots cannot hold every expert."""
    if ranks.num_slots < num_experts:
        raise PlacementError(
            f"{ranks.num_slots} slots for {num_experts} experts: every expert needs a slot; give the ranks more slots"
        )


def as_old(old, num_layers: int, num_experts: int, ranks: Ranks) -> np.ndarray:
    """The placement in service as a fresh int32 [layers, slots].

    Raises:
        PlacementError: for another shape, or a layer that lacks an expert.
    """
    table = np.array(old, dtype=np.int32, order="C")
    if table.shape != (num_layers, ranks.num_slots):
        raise PlacementError(
            f"an old placement of shape {table.shape} for {num_layers} layers of {ranks.num_slots} slots: give the one in service"
        )
    if table.min() < 0 or table.max() >= num_experts:
        raise PlacementError(
            f"an old placement with experts {table.min()} to {table.max()}: experts are numbered 0 to {num_experts - 1}"
        )
    layer, expert = missing_expert(table, num_experts)
    if expert >= 0:
        raise PlacementError(
            f"an old placement without expert {expert} in layer {layer}: every expert needs a slot"
        )
    return table


def by_node(ranks: Ranks):
    """Ranks in order of their node, and how to bring a plan for them back to the given order.

    Returns:
        (Ranks, int64 [slots] the given slot of each new one, function from int32 [layers, slots] in the new order to (the given Ranks,
        int32 [layers, slots])).
    """
    _, node_of = np.unique(ranks.node_of, return_inverse=True)
    node_of = node_of.reshape(-1).astype(np.int64)
    order = np.argsort(node_of, kind="stable")
    width = np.diff(ranks.start)
    start = np.concatenate([[0], np.cumsum(width[order])]).astype(np.int64)
    ordered = Ranks(
        start,
        np.repeat(np.arange(order.size), width[order]),
        node_of[order],
        ranks.speed[order],
        ranks.inverse_speed[order],
        np.ascontiguousarray(ranks.slowness[order]),
    )
    slot_order = np.concatenate([np.arange(ranks.start[r], ranks.start[r + 1]) for r in order])

    def restore(table: np.ndarray):
        result = np.empty_like(table)
        result[:, slot_order] = table
        return ranks, result

    return ordered, slot_order, restore
