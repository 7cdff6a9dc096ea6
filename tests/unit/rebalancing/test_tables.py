"""What engines ask of an EPLB algorithm: the planner over their tables, and the maps back."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.tables import inverse_maps
from moe_placement_plugin.rebalancing.tables import EngineRanks, rebalance_table
from tests.unit.planner.conftest import balance, check_valid

ON_4_NODES = EngineRanks(8, groups=8, nodes=4)


@pytest.fixture
def load():
    return np.random.default_rng(0).lognormal(0, 0.8, (5, 64)) * 1000


def nodes_of_groups(row, size: int, slots_per_node: int) -> list[list[int]]:
    """The nodes that each group of ``size`` experts lies on."""
    return [
        sorted({int(s) // slots_per_node for s in np.flatnonzero(row // size == g)})
        for g in range(row.max() // size + 1)
    ]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_a_plan_is_valid_and_balanced(load, dtype):
    found = rebalance_table(load.astype(dtype), 72, EngineRanks(8, groups=8))
    check_valid(found, [9] * 8, 64)
    assert balance(load, found, [9] * 8) > 0.999


def test_little_moves_from_the_old_placement(load):
    ranks = EngineRanks(8, groups=8)
    old = rebalance_table(load, 72, ranks)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.3, load.shape)
    found = rebalance_table(drifted, 72, ranks, old)
    assert (found != old).mean() < 0.3
    assert balance(drifted, found, [9] * 8) > 0.98
    # A placement of another size, as elastic scaling gives, is no reason to fail.
    check_valid(rebalance_table(drifted, 80, ranks, old), [10] * 8, 64)
    few = rebalance_table(drifted, 72, ranks, old, max_moves=10)
    assert (few != old).sum() <= (found != old).sum()


@pytest.mark.parametrize("with_old", [False, True])
def test_groups_stay_on_nodes(load, with_old):
    old = rebalance_table(load[::-1].copy(), 80, ON_4_NODES) if with_old else None
    found = rebalance_table(load, 80, ON_4_NODES, old)
    check_valid(found, [10] * 8, 64)
    for row in found:
        assert all(len(nodes) == 1 for nodes in nodes_of_groups(row, 8, 20))


def test_groups_are_brought_together_and_then_little_moves(load):
    """What the engine starts with: experts in order, redundant ones at the end, groups apart."""
    linear = np.tile(np.concatenate([np.arange(64), np.arange(16)]), (5, 1))
    first = rebalance_table(load, 80, ON_4_NODES, linear)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.1, load.shape)
    second = rebalance_table(drifted, 80, ON_4_NODES, first)
    assert 0 < (second != first).mean() < 0.2
    for row, later in zip(first, second):
        assert all(len(nodes) == 1 for nodes in nodes_of_groups(row, 8, 20))
        assert nodes_of_groups(row, 8, 20) == nodes_of_groups(later, 8, 20)
    # Groups do change nodes where keeping them costs a lot.
    lopsided = load.copy()
    lopsided[:, first[0, :20]] *= 20
    regrouped = rebalance_table(lopsided, 80, ON_4_NODES, first)
    assert any(
        nodes_of_groups(a, 8, 20) != nodes_of_groups(b, 8, 20) for a, b in zip(first, regrouped)
    )


def test_slots_that_do_not_divide_are_refused(load):
    with pytest.raises(PlacementError, match="73 physical experts on 8 ranks"):
        rebalance_table(load, 73, EngineRanks(8, groups=8))


def test_nodes_are_what_the_ranks_said_where_the_engine_counts_as_many():
    assert EngineRanks(4, nodes=2).nodes_or_runs().tolist() == [0, 0, 1, 1]
    assert EngineRanks(4, 1, 2, (0, 1, 0, 1)).nodes_or_runs().tolist() == [0, 1, 0, 1]
    assert EngineRanks(4, 1, 2, (0, 0, 0, 0)).nodes_or_runs().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("weight", "replicas", "ranks", "counts"),
    [
        # The example of DeepSeek's EPLB.
        (
            [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]],
            16,
            EngineRanks(8, groups=4, nodes=2),
            None,
        ),
        # One GPU.
        ([[10, 20, 30, 40]], 4, EngineRanks(1), [[1, 1, 1, 1]]),
        # All alike.
        ([[50] * 8], 8, EngineRanks(4, groups=4, nodes=2), [[1] * 8]),
        # One hot expert.
        ([[100, 1, 1, 1, 1, 1, 1, 1]], 12, EngineRanks(4, groups=4, nodes=2), None),
        # More groups than nodes.
        (
            [[20] * 16, [10] * 16, [5] * 16],
            16,
            EngineRanks(8, groups=8, nodes=4),
            [[1] * 16] * 3,
        ),
        # Two replicas at most would be worse.
        ([[30, 10], [10, 30]], 4, EngineRanks(4), [[3, 1], [1, 3]]),
        # Nothing recorded yet.
        ([[0] * 8], 8, EngineRanks(4), [[1] * 8]),
    ],
)
def test_what_engines_ask_of_an_eplb_algorithm(weight, replicas, ranks, counts):
    """All experts are there, the replicas where the load is, groups whole."""
    loads = np.array(weight, dtype=np.float64)
    table = rebalance_table(loads, replicas, ranks)
    assert table.shape == (len(weight), replicas)
    check_valid(table, [replicas // ranks.number] * ranks.number, loads.shape[1])
    found = np.stack([np.bincount(row, minlength=loads.shape[1]) for row in table])
    assert counts is None or found.tolist() == counts
    for load, count, row in zip(loads, found, table):
        assert count[np.argmax(load)] == count.max()
        if ranks.nodes > 1:
            nodes = nodes_of_groups(row, len(load) // ranks.groups, replicas // ranks.nodes)
            assert all(len(n) == 1 for n in nodes)
    # Asked from another thread later, the answer is the same.
    assert np.array_equal(table, rebalance_table(loads, replicas, ranks))


def test_maps_lead_back(load):
    table = rebalance_table(load, 80, EngineRanks(8))
    usable = np.arange(80) >= 10
    for mask in (None, usable):
        to_physical, count = inverse_maps(table, 64, mask)
        assert count.sum(axis=1).tolist() == [80 if mask is None else 70] * 5
        for layer in range(5):
            for expert in range(64):
                slots = [s for s in to_physical[layer, expert].tolist() if s >= 0]
                held = np.flatnonzero(table[layer] == expert)
                assert slots == [s for s in held.tolist() if mask is None or mask[s]]
                assert len(slots) == count[layer, expert]
