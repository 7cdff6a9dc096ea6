"""Check one plan for several workloads."""

import numpy as np
import pytest

from moe_placement_plugin.planner import MAX_WINDOWS, plan

from .conftest import balance, check_valid


def test_one_plan_serves_workloads_that_a_plan_for_their_sum_does_not():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.8, (3, 4, 64)) * 10**4
    slots = [9] * 8
    together = plan(load, slots)
    check_valid(together.physical_to_logical, slots, 64)
    on_sum = plan(load.sum(axis=0), slots).physical_to_logical
    for w in range(3):
        assert together.window_balancedness[w] == pytest.approx(
            balance(load[w], together.physical_to_logical, slots)
        )
    assert together.window_balancedness.min() > 0.95
    assert min(balance(load[w], on_sum, slots) for w in range(3)) < 0.93


def test_a_window_counts_by_its_weight_not_by_its_tokens():
    rng = np.random.default_rng(1)
    load = rng.lognormal(0, 0.8, (2, 3, 32))
    slots = [5] * 8
    large = load * np.array([1e6, 1.0])[:, None, None]
    assert np.array_equal(
        plan(load, slots).physical_to_logical, plan(large, slots).physical_to_logical
    )
    only_first = plan(load, slots, window_weights=[1, 0])
    assert only_first.window_balancedness[0] > only_first.window_balancedness[1]


def test_a_window_without_load_is_harmless():
    load = np.random.default_rng(2).integers(1, 100, (2, 3, 16))
    load[1] = 0
    assert plan(load, [4] * 4).window_balancedness[1] == 1


def test_many_windows_and_uneven_ranks():
    load = np.random.default_rng(3).integers(1, 100, (3 * MAX_WINDOWS + 1, 2, 24))
    slots, speed = [8, 8, 0, 10], [1.0, 0.5, 1.0, 1.0]
    found = plan(load, slots, speed=speed)
    check_valid(found.physical_to_logical, slots, 24)
    assert found.window_balancedness.shape == (3 * MAX_WINDOWS + 1,)


def test_two_recordings_at_once(traces):
    """Do better on a third, recorded on traffic much like the first, than the plan for the mean."""
    trained, others = ("in1k_out1k", "in8k_out1k"), ("in1k_out8k",)
    slots = [9] * 32
    found = plan(np.stack([traces[n] for n in trained]), slots)
    assert found.window_balancedness.min() >= 0.995
    mean = sum(traces[n] / traces[n].sum() for n in trained)
    on_mean = plan(mean, slots).physical_to_logical
    gain = min(balance(traces[n], found.physical_to_logical, slots) for n in others) - min(
        balance(traces[n], on_mean, slots) for n in others
    )
    assert gain >= 0.10
