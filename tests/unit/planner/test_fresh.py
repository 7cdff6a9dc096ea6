"""Check plans from nothing: valid, reproducible, and never worse than the reference."""

import heapq
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin.lab.bench.planner.reference import rebalance
from moe_placement_plugin.planner import EFFORTS, plan
from moe_placement_plugin.planner.fresh.pack import make_queue, pack_lpt
from moe_placement_plugin.planner.kernels.compiled import kernel
from moe_placement_plugin.planner.kernels.state import LayerState

from .conftest import balance, check_valid


@st.composite
def problems(draw):
    experts = draw(st.integers(1, 40))
    ranks = draw(st.integers(1, 9))
    slots = [draw(st.integers(0, experts)) for _ in range(ranks)]
    while sum(slots) < experts:
        r = draw(st.integers(0, ranks - 1))
        slots[r] = experts if slots[r] + experts // 2 + 1 > experts else slots[r] + experts // 2 + 1
    kind = draw(st.sampled_from(["small", "zero", "hot", "huge", "float"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = rng.integers(0, 5, (2, experts))
    if kind == "zero":
        load[:] = 0
    elif kind == "hot":
        load[:, 0] += 10**6
    elif kind == "huge":
        load = load * 10**12
    elif kind == "float":
        load = rng.lognormal(0, 3, (2, experts))
    return load, slots, draw(st.sampled_from([None, 1.0, 0.25]))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["fast", "best"]))
def test_any_problem_gets_a_valid_plan_whose_figures_are_true(problem, mode):
    load, slots, slow = problem
    speed = None if slow is None else [slow] + [1.0] * (len(slots) - 1)
    found = plan(load, slots, speed=speed, mode=mode)
    check_valid(found.physical_to_logical, slots, load.shape[1])
    if load.sum():
        assert found.overall == pytest.approx(
            balance(load, found.physical_to_logical, slots, speed)
        )
        assert 0 < found.overall <= 1 + 1e-9
    else:
        assert found.overall == 1


@pytest.mark.parametrize("mode", EFFORTS)
def test_equal_input_gives_the_equal_plan(mode):
    load = np.random.default_rng(3).zipf(1.3, (3, 48)).clip(max=10**6)
    first = plan(load, [10] * 6, mode=mode).physical_to_logical
    assert np.array_equal(
        first, plan(load.astype(np.float64), [10] * 6, mode=mode).physical_to_logical
    )


def test_the_plan_does_not_depend_on_the_unit_of_the_load():
    load = np.random.default_rng(4).integers(1, 1000, (3, 48))
    assert np.array_equal(
        plan(load, [9] * 6).physical_to_logical, plan(load * 2**20, [9] * 6).physical_to_logical
    )


@pytest.mark.parametrize("family", ["uniform", "zipf 1.2", "lognormal", "one hot", "bimodal"])
@pytest.mark.parametrize(("ranks", "slots"), [(8, 64), (8, 72), (16, 80), (32, 64)])
def test_both_modes_are_at_least_as_balanced_as_the_reference(family, ranks, slots):
    from moe_placement_plugin.lab.bench.planner.families import counts, popularity

    rng = np.random.default_rng(5)
    load = counts(popularity(family, 4, 64, rng), rng)
    sizes = [slots // ranks] * ranks
    reference = balance(load, rebalance(load, slots, 1, 1, ranks), sizes)
    fast = balance(load, plan(load, sizes, mode="fast").physical_to_logical, sizes)
    best = balance(load, plan(load, sizes).physical_to_logical, sizes)
    assert fast >= reference - 1e-6
    assert best >= fast - 5e-4  # the search stops within a tolerance of the bound


def test_thirty_experts_on_eight_ranks():
    load = np.random.default_rng(6).integers(1, 100, (4, 30))
    slots = [4, 4, 4, 4, 4, 4, 3, 3]
    found = plan(load, slots)
    check_valid(found.physical_to_logical, slots, 30)
    assert found.overall > 0.95


def test_a_slow_rank_gets_less_and_a_dead_one_nothing():
    load = np.random.default_rng(7).integers(50, 100, (4, 64))
    slots, speed = [6, 12, 0, 12, 12, 12, 12, 8], [0.5, 1, 1, 1, 1, 1, 1, 1]
    for mode in ("fast", "best"):
        found = plan(load, slots, speed=speed, mode=mode)
        check_valid(found.physical_to_logical, slots, 64)
        assert balance(load, found.physical_to_logical, slots, speed) > 0.97


def test_more_slots_on_a_rank_than_experts_repeats_some():
    found = plan(np.array([[3, 1]]), [3, 2])
    assert set(found.physical_to_logical[0, :3]) == {0, 1} == set(found.physical_to_logical[0, 3:])


def test_a_fresh_plan_keeps_the_labels_of_the_old_one():
    load = np.random.default_rng(8).integers(1, 1000, (3, 32))
    slots = [9] * 4
    table = plan(load, slots).physical_to_logical
    shuffled = table.reshape(3, 4, 9)[:, [2, 0, 3, 1], ::-1].reshape(3, 36)
    again = plan(load, slots, old=shuffled)
    assert again.moved_slots == 0
    assert np.array_equal(again.physical_to_logical, shuffled)


@pytest.mark.parametrize("mode", ["fast", "best"])
@pytest.mark.parametrize("speed", [None, [1.0, 1.0, 0.5, 1.0]])
def test_figures_are_those_of_the_load_that_was_planned_for(mode, speed):
    load = np.random.default_rng(9).lognormal(0, 1, (3, 32))
    pace = None if speed is None else np.array(speed)
    found = plan(load, [9] * 4, speed=pace, mode=mode)
    expected = balance(load, found.physical_to_logical, [9] * 4, speed)
    load[:] = 1  # the caller's arrays are the caller's
    if pace is not None:
        pace[:] = [1, 2, 3, 4]
    assert pickle.loads(pickle.dumps(found)).overall == pytest.approx(expected)
    assert found.overall == pytest.approx(expected)
    assert found.balancedness.shape == (3,)
    assert found.window_balancedness[0] == pytest.approx(expected)


@kernel
def _pack(item_expert, item_load, start, state):
    """Call `pack_lpt`, which only kernels can."""
    queue = make_queue(start.size - 1, state.expert_of.size)
    return pack_lpt(item_expert, item_load, start, state, queue)


def _dealt_one_by_one(loads, counts, start):
    """Deal as `pack_lpt` promises, with a heap; equal ranks in the order in which they came."""
    waiting = [(0.0, r, r) for r in range(len(start) - 1) if start[r + 1] > start[r]]
    came, filled = len(start), list(start[:-1])
    table = np.full(start[-1], -1)
    for expert, (load, count) in enumerate(zip(loads, counts, strict=True)):
        if len(waiting) < count:
            return None
        chosen = [heapq.heappop(waiting) for _ in range(count)]
        for before, _, r in reversed(chosen):
            table[filled[r]] = expert
            filled[r] += 1
            if filled[r] < start[r + 1]:
                heapq.heappush(waiting, (before + load, came, r))
                came += 1
    return table


@pytest.mark.parametrize(
    "ranks", [1, 3, 32, 300]
)  # places are counted up to 256 ranks, searched above
@pytest.mark.parametrize("kind", ["ties", "equal", "one hot", "steep", "smooth"])
def test_replicas_are_dealt_heaviest_first_to_the_least_loaded_rank(ranks, kind):
    rng = np.random.default_rng(10)
    start = np.concatenate([[0], np.cumsum(rng.integers(0, 9, ranks) + (ranks < 4))])
    counts = []
    while sum(counts) < start[-1]:
        counts.append(min(int(rng.choice([1, 1, 1, min(3, ranks)])), start[-1] - sum(counts)))
    experts = len(counts)
    loads = {
        "ties": rng.integers(0, 4, experts).astype(float),
        "equal": np.ones(experts),
        "one hot": np.r_[1e6, np.ones(experts - 1)],
        "steep": 0.5 ** np.arange(experts),
        "smooth": rng.lognormal(0, 1, experts),
    }[kind]
    loads = -np.sort(-loads)
    slots = int(start[-1])
    table, share, rank_load = np.empty(slots, np.int32), np.empty(slots), np.empty(ranks)
    state = LayerState(loads, np.array(counts), table, share, rank_load)
    packed = _pack(np.arange(experts), loads, start, state)
    expected = _dealt_one_by_one(loads, counts, start)
    assert packed == (expected is not None)
    if packed:
        assert np.array_equal(table, expected)
        assert np.array_equal(share, loads[table])
        assert rank_load == pytest.approx([share[a:b].sum() for a, b in zip(start, start[1:])])
