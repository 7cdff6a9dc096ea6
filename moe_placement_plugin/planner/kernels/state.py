"""Tuples in which kernels are handed what belongs together.

numba passes a NamedTuple by value, as if its fields were arguments. Every array is C-contiguous and
has the dtype that is written here, whoever makes the tuple: another type, and numba compiles all
that is called with it once more. Kernels take what they need out of a tuple before their loops,
for numba counts references to an array wherever it is taken out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Ranks(NamedTuple):
    """Describe the ranks that a plan is for; made by `make_ranks`.

    Attributes:
        start: int64 [ranks + 1], first slot of each rank; a rank without slots is down.
        rank_of: int64 [slots].
        node_of: int64 [ranks].
        speed: float64 [ranks], relative.
        inverse_speed: float64 [ranks].
        slowness: int64 [ranks], inverse speeds as integers: all 1 for equal ranks, else the
            slowest has 2**20.
    """

    start: np.ndarray
    rank_of: np.ndarray
    node_of: np.ndarray
    speed: np.ndarray
    inverse_speed: np.ndarray
    slowness: np.ndarray

    @property
    def num_ranks(self) -> int:
        """Return how many ranks there are, those that are down included."""
        return self.start.size - 1

    @property
    def num_slots(self) -> int:
        """Return the slots of all ranks."""
        return int(self.start[-1])

    @property
    def num_nodes(self) -> int:
        """Return how many nodes have ranks."""
        return np.unique(self.node_of).size

    @property
    def slots_per_rank(self) -> np.ndarray:
        """Return the slots of each rank, int64 [ranks]."""
        return np.diff(self.start)

    @property
    def unit(self) -> float:
        """Return the time at slowness 1 as a multiple of the time at an inverse speed of 1."""
        if self.slowness.min() == self.slowness.max():
            return 1.0
        return float(self.slowness.max() / self.inverse_speed.max())

    @property
    def total_slowness(self) -> float:
        """Return the sum of 1 / slowness of ranks with slots: load over this is the mean time."""
        return float((1.0 / self.slowness[self.slots_per_rank > 0]).sum())

    @property
    def total_speed(self) -> float:
        """Return the speed of all ranks that have slots."""
        return float(self.speed[self.slots_per_rank > 0].sum())


def make_ranks(
    slots_per_rank: np.ndarray, node_of: np.ndarray, speed: np.ndarray, slowness: np.ndarray
) -> Ranks:
    """Bring the description of ranks into the arrays that kernels take.

    Args:
        slots_per_rank: int [ranks].
        node_of: int [ranks].
        speed: float [ranks].
        slowness: int [ranks], see `Ranks`.
    """
    pace = np.ascontiguousarray(speed, dtype=np.float64)
    start = np.zeros(len(slots_per_rank) + 1, np.int64)
    np.cumsum(slots_per_rank, out=start[1:])
    return Ranks(
        start,
        np.repeat(np.arange(start.size - 1, dtype=np.int64), slots_per_rank),
        np.ascontiguousarray(node_of, dtype=np.int64),
        pace,
        1.0 / pace,
        np.ascontiguousarray(slowness, dtype=np.int64),
    )


class SearchLimits(NamedTuple):
    """Limit the search for a plan from nothing.

    Attributes:
        tolerance: float, a layer is done within this fraction of its lower bound.
        max_swaps: int, quick swaps per layer at most.
        kicks: int, restarts of the thorough search; if negative it is left out for ranks of equal
            speed.
    """

    tolerance: float
    max_swaps: int
    kicks: int


class LayerState(NamedTuple):
    """Hold one layer's placement while it is searched; integers but for the quick search's floats.

    Attributes:
        load: int64 [experts], see `layer`; or float64.
        replicas: int64 [experts], slots of each expert.
        expert_of: int32 [slots].
        share_of: int64 [slots], load of the slot's replica; or float64.
        rank_load: int64 [ranks]; or float64.
    """

    load: np.ndarray
    replicas: np.ndarray
    expert_of: np.ndarray
    share_of: np.ndarray
    rank_load: np.ndarray


class WindowsState(NamedTuple):
    """Hold one layer's placement while it is searched for several windows at once.

    Attributes:
        load: int64 [windows, experts].
        replicas: int64 [experts], slots of each expert.
        expert_of: int32 [slots].
        share_of: int64 [windows, slots], load of the slot's replica.
        rank_load: int64 [windows, ranks].
        slot_load: int64 [windows, slots], load of the slot's rank.
    """

    load: np.ndarray
    replicas: np.ndarray
    expert_of: np.ndarray
    share_of: np.ndarray
    rank_load: np.ndarray
    slot_load: np.ndarray


class SlotLists(NamedTuple):
    """Link the slots of each expert.

    Attributes:
        first: int64 [experts], the first slot of each expert; -1 for none.
        next: int64 [slots], the next slot of the same expert; -1 at the end.
    """

    first: np.ndarray
    next: np.ndarray


class SlotHistory(NamedTuple):
    """Tell what lies where now, and what lay where in the placement in service.

    Attributes:
        now: the slots of each expert.
        before: the same in the placement in service.
        foreign: int64 [slots], 1 if the slot's rank did not hold its expert before, else 0.
    """

    now: SlotLists
    before: SlotLists
    foreign: np.ndarray


class MoveLimits(NamedTuple):
    """Limit the search for few moves in one layer.

    Attributes:
        target: int64, time to which ranks are lowered.
        cap: int64, no replica may become heavier than this by giving up others of its expert.
        even: bool, whether all ranks are equally fast.
        node_slots: int64 [ranks, 2], first and last + 1 of the slots of the rank's node, which no
            expert leaves.
    """

    target: int
    cap: int
    even: bool
    node_slots: np.ndarray


class Candidates(NamedTuple):
    """List slots in any order, with what a search looks at first.

    Attributes:
        slots: int64 [slots], those on the list first.
        place: int64 [slots], where on the list each slot is; -1 if it is not.
        value: int32 [3, slots and some], by place; what is behind the list promises no gain, so
            that loops may run on to a multiple of 8, all in vector code.
        size: int64 [1], how many are listed.
    """

    slots: np.ndarray
    place: np.ndarray
    value: np.ndarray
    size: np.ndarray


class Screen(NamedTuple):
    """Hold what a search for few moves looks at coarsely, kept from step to step; see `screening`.

    Attributes:
        share: int32 [slots], load of the slot's replica.
        slack: int32 [slots], time by which the slot's rank is below the target (equal ranks only).
        guests: slots whose rank did not hold their expert in the placement in service; values are
            share, slack, and how many bits a gain is shifted for steps that cost nothing.
        spares: slots of replicated experts, the only ones that may be given up; values are the
            excess that the expert's other ranks gain by that, the time for which the rank has room
            in its place, and bits as above.
        give_up: int64 [slots], the first of the spares' values in full.
        seen_load: int64 [ranks], rank loads that all these values stand for.
        valued: int64 [experts], the step before which `give_up` was last written.
        stuck: bool [ranks], those off which no step gains until one is taken elsewhere.
        gain: int32 [most slots of a rank, slots and some], scratch.
        largest: int64 [most slots of a rank], scratch.
    """

    share: np.ndarray
    slack: np.ndarray
    guests: Candidates
    spares: Candidates
    give_up: np.ndarray
    seen_load: np.ndarray
    valued: np.ndarray
    stuck: np.ndarray
    gain: np.ndarray
    largest: np.ndarray


class Steps(NamedTuple):
    """Log the steps of one layer.

    Attributes:
        slot: int64 [steps, 2], which slots each step wrote; -1 for no second one.
        expert: int32 [steps, 2], what they hold from then on.
        moves: int64 [steps], slots that have to be fetched after each step.
        time: int64 [steps], the busiest rank's.
    """

    slot: np.ndarray
    expert: np.ndarray
    moves: np.ndarray
    time: np.ndarray


class Bounds(NamedTuple):
    """Hold what no plan can beat, by layer.

    Attributes:
        busiest: float64 [layers], lower bound of the busiest rank's time.
        largest: float64 [layers], largest replica of the optimal replication.
    """

    busiest: np.ndarray
    largest: np.ndarray
