"""Check plans with nodes: hierarchical, soft, and by co-activation."""

import numpy as np
import pytest

from moe_placement_plugin.lab.bench.planner.measures import bound
from moe_placement_plugin.lab.bench.planner.reference import pack, rebalance
from moe_placement_plugin.planner import coactivation_of, crossings_per_token, locality_curve, plan
from moe_placement_plugin.planner.arguments import as_ranks
from moe_placement_plugin.planner.kernels.state import SearchLimits
from moe_placement_plugin.planner.nodes.groups import hierarchical_plan

from ...support.recordings import routed_tokens
from .conftest import balance, check_valid


def nodes_of_groups(table, slots, node_of, groups):
    node_of_slot = np.repeat(node_of, slots)
    size = (table.max() + 1) // groups
    return [
        {int(n) for n in node_of_slot[row // size == g]} for row in table for g in range(groups)
    ]


@pytest.mark.parametrize("node_of", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 0, 1, 2, 3]])
@pytest.mark.parametrize("slots", [8, 10])
def test_groups_stay_on_one_node(node_of, slots):
    load = np.random.default_rng(0).lognormal(0, 1, (5, 64))
    found = plan(load, [slots] * 8, node_of_rank=node_of, num_groups=8, locality="node")
    check_valid(found.physical_to_logical, [slots] * 8, 64)
    assert all(
        len(n) == 1 for n in nodes_of_groups(found.physical_to_logical, [slots] * 8, node_of, 8)
    )
    assert found.leaving == 0
    if node_of[1] == 0:
        reference = balance(load, rebalance(load, 8 * slots, 8, 4, 8), [slots] * 8)
        assert found.overall >= reference - 1e-6


def test_many_groups_and_uneven_nodes():
    load = np.random.default_rng(1).lognormal(0, 1, (3, 96))
    slots, node_of = [10, 10, 10, 20, 20, 30, 20, 20], [0, 0, 0, 1, 1, 2, 2, 2]
    found = plan(load, slots, node_of_rank=node_of, num_groups=24, locality="node")
    check_valid(found.physical_to_logical, slots, 96)
    assert all(len(n) == 1 for n in nodes_of_groups(found.physical_to_logical, slots, node_of, 24))


@pytest.mark.parametrize(
    ("slots", "groups", "at_least"), [(8, 8, 0.0), (8, 16, 0.01), (10, 16, 0.02)]
)
def test_groups_are_packed_by_balance_not_by_sum(slots, groups, at_least):
    """Compare with groups packed by their sums, as DeepSeek's EPLB does, planned alike inside."""
    node_of = np.arange(8) // 2
    load = np.random.default_rng(0).lognormal(0, 1.0, (12, 64))
    by_sum = np.empty((12, groups), np.int64)
    for layer, sums in enumerate(load.reshape(12, groups, -1).sum(axis=2)):
        for node, members in enumerate(pack(sums, 4)):
            by_sum[layer, members] = node
    theirs = balance(
        load,
        hierarchical_plan(load, as_ranks([slots] * 8, node_of), by_sum, SearchLimits(4e-4, 4, 32)),
        [slots] * 8,
    )
    ours = plan(load, [slots] * 8, node_of_rank=node_of, num_groups=groups, locality="node").overall
    assert ours >= theirs + at_least - 1e-6


def test_hierarchical_reaches_its_bound_on_recordings(traces):
    for load in traces.values():
        for slots, share in ((256, 0.9995), (288, 0.995)):
            found = plan(
                load,
                [slots // 32] * 32,
                node_of_rank=np.arange(32) // 8,
                num_groups=8,
                locality="node",
            )
            assert found.overall >= share * bound(load, 32, slots, 8, 4)


def test_soft_form_trades_locality_for_balance(traces):
    where = {"node_of_rank": np.arange(32) // 8, "num_groups": 8}
    load = traces["in1k_out8k"]
    curve = locality_curve(load, [9] * 32, **where)
    assert curve[0].leaving == 0 and curve[0].balancedness < 0.8
    assert any(p.balancedness >= 0.95 and p.leaving <= 0.10 for p in curve)
    few = plan(load, [9] * 32, locality="soft", max_leaving=0.05, **where)
    check_valid(few.physical_to_logical, [9] * 32, 256)
    assert few.leaving <= 0.05 and few.overall > curve[0].balancedness
    dear = plan(load, [9] * 32, locality="soft", locality_penalty=100.0, **where)
    assert dear.leaving == 0


def test_counting_pairs_and_crossings():
    ids = np.array([[[0, 1], [0, 2], [3, 1]]])
    pairs = coactivation_of(ids, 4)
    assert (
        pairs[0, 0, 1] == pairs[0, 1, 0] == 1
        and pairs[0, 0, 2] == 1
        and pairs[0, 1, 3] == 1
        and pairs.sum() == 6
    )
    apart, together = np.array([[0, 3, 1, 2]]), np.array([[0, 1, 2, 3]])
    node_of_slot = np.array([0, 0, 1, 1])
    assert crossings_per_token(ids, together, node_of_slot) == pytest.approx(2 / 3)
    assert crossings_per_token(ids, apart, node_of_slot) == 1.0


def test_coactivation_lowers_crossings_within_the_allowance():
    ids = routed_tokens(layers=6, tokens=4000)
    half = ids.shape[1] // 2
    load = np.stack([np.bincount(x.ravel(), minlength=64) for x in ids[:, :half]])
    pairs = coactivation_of(ids[:, :half], 64)
    node_of = np.arange(8) // 2
    node_of_slot = np.repeat(node_of, 8)
    plain = plan(load, [8] * 8, node_of_rank=node_of)
    near = plan(load, [8] * 8, node_of_rank=node_of, coactivation=pairs)
    check_valid(near.physical_to_logical, [8] * 8, 64)
    assert near.overall >= 1 / 1.05 - 1e-6
    held_out = ids[:, half:]
    before, after = (
        crossings_per_token(held_out, p.physical_to_logical, node_of_slot) for p in (plain, near)
    )
    assert after < 0.75 * before
    apart = plan(load, [8] * 8, coactivation=pairs, coactivation_goal="spread")
    rank_of_slot = np.repeat(np.arange(8), 8)
    assert crossings_per_token(
        held_out, apart.physical_to_logical, rank_of_slot
    ) > crossings_per_token(held_out, plain.physical_to_logical, rank_of_slot)
