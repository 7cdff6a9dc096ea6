"""Compare the best step of a plan with few moves with a search that looks at all in full."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin.planner import plan
from moe_placement_plugin.planner.arguments import as_ranks
from moe_placement_plugin.planner.kernels.compiled import inner_kernel, kernel
from moe_placement_plugin.planner.kernels.layer import LOAD_SCALE, measure
from moe_placement_plugin.planner.kernels.slot_lists import has, list_slots
from moe_placement_plugin.planner.kernels.state import LayerState, MoveLimits, Ranks
from moe_placement_plugin.planner.limited.descent import make_history
from moe_placement_plugin.planner.limited.new_replicas import best_new_replica
from moe_placement_plugin.planner.limited.screening import (
    FREE,
    clear_screen,
    keep_lists,
    make_screen,
    see_changes,
)
from moe_placement_plugin.planner.limited.swaps import best_swap

EXPERTS = 24


@inner_kernel(makes_arrays=True)
def _begin(state, ranks, old, limits):
    """Return history and screen as `descend_moves` has them on the way from a placement."""
    measure(state, ranks.start)
    history = make_history(state.load.size, old.size)
    list_slots(state.expert_of, history.now)
    list_slots(old, history.before)
    screen = make_screen(state.load.size, ranks.start)
    clear_screen(screen)
    for s in range(old.size):
        expert = state.expert_of[s]
        foreign = np.int64(not has(expert, ranks.rank_of[s], ranks.rank_of, history.before))
        history.foreign[s] = foreign
        keep_lists(screen.guests, screen.spares, s, foreign, state.replicas[expert])
    see_changes(state, ranks, history.now, screen, limits, np.int64(0))
    return history, screen


@kernel
def _best_swap(state, ranks, old, limits, hot):
    """Return the rate of the best swap off a rank."""
    history, screen = _begin(state, ranks, old, limits)
    return best_swap(state, ranks, history, screen, limits, hot, 0.0)[0]


@kernel
def _best_new_replica(state, ranks, old, limits, hot):
    """Return the rate of the best new replica of an expert of a rank."""
    history, screen = _begin(state, ranks, old, limits)
    return best_new_replica(state, ranks, history, screen, limits, hot, 0.0)[0]


def over(time, target):
    return max(0, time - target)


def excess(times, target):
    return sum(over(int(t), target) for t in times)


class Layer:
    """Hold one layer on its way from a placement: for the kernels, and in plain Python."""

    def __init__(self, seed: int, slots: list[int], speed: list[float] | None):
        rng = np.random.default_rng(seed)
        self.ranks = as_ranks(slots, speed=speed)
        self.even = self.ranks.slowness.min() == self.ranks.slowness.max()
        load = rng.lognormal(0, 0.8, EXPERTS)
        self.old = np.array(
            plan(
                (load * 1e6).astype(np.int64)[None], slots, speed=speed, mode="fast"
            ).physical_to_logical[0]
        )
        shifted = load * rng.lognormal(0, 0.6, EXPERTS)
        self.load = (shifted / shifted.sum() * LOAD_SCALE).astype(np.int64)
        self.expert_of = self.old.copy()
        # Some slots hold what is not at home, replicas come and go.
        for _ in range(rng.integers(0, 6)):
            i, j = rng.integers(0, self.expert_of.size, 2)
            if rng.random() < 0.5 and self.count[self.expert_of[i]] > 1:
                self.place({i: self.expert_of[j]})
            else:
                self.place({i: self.expert_of[j], j: self.expert_of[i]})
        times = self.times(self.expert_of)
        self.target = int(times.sum() / times.size * 1.02)
        self.hot = int(times.argmax())
        self.cap = int(self.load.max())
        self.share_of = (self.load // self.count)[self.expert_of]
        self.foreign = [
            self.expert_of[s] not in self.held(self.old, rank)
            for s, rank in enumerate(self.ranks.rank_of)
        ]

    @property
    def count(self):
        return np.bincount(self.expert_of, minlength=EXPERTS).astype(np.int64)

    def held(self, expert_of, rank):
        return set(expert_of[self.ranks.start[rank] : self.ranks.start[rank + 1]].tolist())

    def place(self, changes: dict[int, int]) -> None:
        changed = self.expert_of.copy()
        for slot, expert in changes.items():
            changed[slot] = expert
        widths = np.diff(self.ranks.start)
        if np.unique(changed).size == EXPERTS and all(
            len(self.held(changed, r)) == widths[r] for r in range(widths.size)
        ):
            self.expert_of = changed

    def times(self, expert_of):
        share = self.load // np.maximum(np.bincount(expert_of, minlength=EXPERTS), 1)
        loads = np.add.reduceat(share[expert_of], self.ranks.start[:-1])
        return loads * self.ranks.slowness

    def given(self) -> tuple[LayerState, Ranks, np.ndarray, MoveLimits, int]:
        """Return what the kernels take."""
        slots = self.expert_of.size
        state = LayerState(
            self.load,
            self.count,
            self.expert_of,
            np.empty(slots, np.int64),
            np.empty(self.ranks.num_ranks, np.int64),
        )
        node_slots = np.tile(np.array([0, slots]), (self.ranks.num_ranks, 1))
        limits = MoveLimits(self.target, self.cap, bool(self.even), node_slots)
        return state, self.ranks, self.old, limits, self.hot

    def best_swap(self) -> float:
        return _best_swap(*self.given())

    def best_new_replica(self) -> float:
        return _best_new_replica(*self.given())

    def rate(self, changed, slots, room) -> float:
        """Return excess removed and room made per slot to be fetched.

        Args:
            changed: int [slots], the placement after a step.
            slots: those that the step writes.
            room: load that leaves the busy rank, as it counts.
        """
        gain = excess(self.times(self.expert_of), self.target) - excess(
            self.times(changed), self.target
        )
        if gain <= 0:
            return 0.0
        gain += room
        new = [changed[s] not in self.held(self.old, self.ranks.rank_of[s]) for s in slots]
        cost = sum(new) - sum(int(self.foreign[s]) for s in slots)
        return FREE * gain if cost <= 0 else gain / cost

    def every_swap(self):
        """Return (rate, whether a search must know it) of all swaps off the busiest rank.

        Those that leave an expert twice on a rank are none. That a replica which has never moved is
        at home on the other rank as well is not looked for.
        """
        rates = []
        hot = self.hot
        for i in range(self.ranks.start[hot], self.ranks.start[hot + 1]):
            for j in range(self.expert_of.size):
                q = self.ranks.rank_of[j]
                a, b = self.expert_of[i], self.expert_of[j]
                if (
                    q == hot
                    or a in self.held(self.expert_of, q)
                    or b in self.held(self.expert_of, hot)
                ):
                    continue
                changed = self.expert_of.copy()
                changed[i], changed[j] = b, a
                room = int(self.share_of[i] - self.share_of[j]) * int(self.ranks.slowness[hot]) >> 5
                twice = (not self.foreign[i] and a in self.held(self.old, q)) or (
                    not self.foreign[j] and b in self.held(self.old, hot)
                )
                rates.append((self.rate(changed, (i, j), room), not twice))
        return rates

    def every_new_replica(self):
        """Return (rate, expert that gains a replica, expert that loses one, whether a must)."""
        rates = []
        count = self.count
        for e in self.held(self.expert_of, self.hot):
            for s in range(self.expert_of.size):
                r = self.ranks.rank_of[s]
                if (
                    r == self.hot
                    or count[self.expert_of[s]] < 2
                    or e in self.held(self.expert_of, r)
                ):
                    continue
                changed = self.expert_of.copy()
                changed[s] = e
                must = self.foreign[s] or e not in self.held(self.old, r)
                rates.append((self.rate(changed, (s,), 0), e, self.expert_of[s], must))
        return rates


CASES = [([5] * 6, None), ([8, 3, 5, 4, 6, 4], None), ([5] * 6, [0.7, 1.0, 1.3, 1.0, 0.9, 1.1])]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(CASES))
def test_no_swap_off_the_busiest_rank_is_better(seed, case):
    layer = Layer(seed, *case)
    found = layer.best_swap()
    swaps = layer.every_swap()
    least = max((rate for rate, must in swaps if must), default=0.0)
    assert (
        least * (1 - 1e-6) - 4.0
        <= found
        <= max((rate for rate, _ in swaps), default=0.0) * (1 + 1e-6) + 4.0
    )


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(CASES))
def test_no_new_replica_of_its_experts_is_better(seed, case):
    """Leave out where a rank holds both experts: what it loses is estimated there."""
    layer = Layer(seed, *case)
    found = layer.best_new_replica()
    ranks_of = [
        {layer.ranks.rank_of[s] for s in np.flatnonzero(layer.expert_of == e)}
        for e in range(EXPERTS)
    ]
    clear = [
        rate
        for rate, e, f, must in layer.every_new_replica()
        if must and not ranks_of[e] & ranks_of[f]
    ]
    assert found >= max(clear, default=0.0) * (1 - 1e-6) - 4.0
