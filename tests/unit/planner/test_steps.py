"""The best step of a plan with few moves, against a search that looks at all of them in full."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin.planner import plan
from moe_placement_plugin.planner.arguments import as_ranks
from moe_placement_plugin.planner.kernels.layer import LOAD_SCALE, measure
from moe_placement_plugin.planner.limited import new_replicas, screening, slot_lists, swaps

EXPERTS = 24


def over(time, target):
    return max(0, time - target)


def excess(times, target):
    return sum(over(int(t), target) for t in times)


class Layer:
    """One layer on its way from a placement: what the kernels are given, and the same in plain Python."""

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
        for _ in range(
            rng.integers(0, 6)
        ):  # some slots hold what is not at home, replicas come and go
            i, j = rng.integers(0, self.expert_of.size, 2)
            if rng.random() < 0.5 and self.count[self.expert_of[i]] > 1:
                self.place({i: self.expert_of[j]})
            else:
                self.place({i: self.expert_of[j], j: self.expert_of[i]})
        times = self.times(self.expert_of)
        self.target = int(times.sum() / times.size * 1.02)
        self.hot = int(times.argmax())
        self.cap = int(self.load.max())

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

    def kernels(self):
        """(sizes, guests, spares, ...) as `transition.descend_moves` keeps them."""
        slots = self.expert_of.size
        self.share_of, self.rank_load = (
            np.empty(slots, np.int64),
            np.empty(self.ranks.num_ranks, np.int64),
        )
        count = self.count
        measure(self.load, count, self.ranks.start, self.expert_of, self.share_of, self.rank_load)
        self.now, self.before = (
            (np.empty(EXPERTS, np.int64), np.empty(slots, np.int64)) for _ in range(2)
        )
        slot_lists.list_slots(self.expert_of, *self.now)
        slot_lists.list_slots(self.old, *self.before)
        self.foreign = np.array(
            [
                self.expert_of[s] not in self.held(self.old, self.ranks.rank_of[s])
                for s in range(slots)
            ],
            np.int64,
        )
        self.sizes = np.zeros(2, np.int64)
        self.guests, self.spares = screening.empty_list(slots), screening.empty_list(slots)
        for s in range(slots):
            screening.keep_lists(
                self.sizes, *self.guests, *self.spares, s, self.foreign[s], count[self.expert_of[s]]
            )
        self.near = np.empty(slots, np.int32), np.empty(slots, np.int32)
        self.give_up = np.empty(slots, np.int64)
        valued = np.full(EXPERTS, -1, np.int64)
        for r in range(self.ranks.num_ranks):
            screening.see_rank(
                *self.near, *self.guests[1:], *self.spares[1:], self.give_up, r, 0, valued, self.even, self.target, self.cap, self.load, count,
                self.ranks.start, self.ranks.rank_of, self.ranks.slowness, self.expert_of, self.share_of, self.rank_load, *self.now,
            )  # fmt: skip
        width = int(np.diff(self.ranks.start).max())
        self.scratch = np.empty((width, slots + 8), np.int32), np.empty(width, np.int64)
        return count

    def best_swap(self) -> float:
        self.kernels()
        return swaps.best_swap(
            *self.near, self.sizes, self.guests[0], self.guests[2], self.hot, 0, self.expert_of.size, self.target, 0.0, self.even,
            self.ranks.start, self.ranks.rank_of, self.ranks.slowness, self.foreign, self.expert_of, self.share_of, self.rank_load,
            *self.now, *self.before, *self.scratch,
        )[0]  # fmt: skip

    def best_new_replica(self) -> float:
        count = self.kernels()
        return new_replicas.best_new_replica(
            self.sizes, *self.spares, self.give_up, self.hot, 0, self.expert_of.size, self.target, 0.0, self.even, self.load, count,
            self.ranks.start, self.ranks.rank_of, self.ranks.slowness, self.foreign, self.expert_of, self.share_of, self.rank_load,
            *self.now, *self.before, *self.scratch,
        )[0]  # fmt: skip

    def rate(self, changed, slots, room) -> float:
        """Excess removed and room made per slot to be fetched, for `slots` of the present placement that hold what `changed` says."""
        gain = excess(self.times(self.expert_of), self.target) - excess(
            self.times(changed), self.target
        )
        if gain <= 0:
            return 0.0
        gain += room
        new = [changed[s] not in self.held(self.old, self.ranks.rank_of[s]) for s in slots]
        cost = sum(new) - sum(int(self.foreign[s]) for s in slots)
        return screening.FREE * gain if cost <= 0 else gain / cost

    def every_swap(self):
        """(Rate, whether a search must know it) of all swaps off the busiest rank that leave no expert twice on a rank.

        That a replica which has never moved is at home on the other rank as well is not looked for.
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
        """(Rate, expert that gains a replica, expert that loses one, whether a search must know it), as `every_swap`."""
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
    """Where ranks hold both the expert that gains a replica and the one that loses one, what they lose is estimated: those are left out."""
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
