"""Compare the vectorized dispatch table with SGLang's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.sglang.dispatch_table import dispatch_table

pytest.importorskip("sglang", reason="runs in SGLang's environment")
from moe_placement_plugin.lab.bench.recording.sglang_dispatch import (  # noqa: E402
    replica_imbalance,
    skewed_placement,
    stock_table,
)


def random_slots(seed: int, ranks: int, per_rank: int, experts: int, layers: int = 2) -> np.ndarray:
    """Make a random placement in which no rank holds an expert twice.

    Returns:
        Its slots, ``[layers, experts, most replicas]``.
    """
    rng = np.random.default_rng(seed)
    where = [[[] for _ in range(experts)] for _ in range(layers)]
    for layer in range(layers):
        order = rng.permutation(ranks * per_rank)
        for index, expert in enumerate(rng.permutation(experts)):
            where[layer][expert].append(int(order[index]))
        for slot in order[experts:]:
            free = [
                e
                for e in range(experts)
                if all(s // per_rank != slot // per_rank for s in where[layer][e])
            ]
            if free:
                where[layer][int(rng.choice(free))].append(int(slot))
    width = max(len(slots) for rows in where for slots in rows)
    return np.array(
        [[sorted(slots) + [-1] * (width - len(slots)) for slots in rows] for rows in where]
    )


def classes(slots_of, table, ranks, per_rank, per_node):
    """Return how near each pick is: 0 on the rank, 1 on the node where that narrows, 2 any."""
    owner = np.where(slots_of == -1, -1, slots_of // per_rank)
    result = np.empty(table.shape, dtype=int)
    for rank in range(ranks):
        pick = table[rank] // per_rank
        replicas = (slots_of != -1).sum(-1)
        near = (
            ((owner != -1) & (owner // per_node == rank // per_node)).sum(-1)
            if per_node
            else replicas
        )
        own = (owner == rank).any(-1)
        narrowing = (near > 0) & (near < replicas)
        result[rank] = np.where(own, 0, np.where(narrowing, 1, 2))
        # Whatever was picked holds the expert and is as near as it can be.
        assert (table[rank][..., None] == slots_of).any(-1).all()
        assert (pick[own] == rank).all()
        if per_node:
            assert (pick[narrowing & ~own] // per_node == rank // per_node).all()
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.sampled_from([1, 2, 4]),
    on_node=st.integers(1, 4),
    per_rank=st.integers(1, 4),
    data=st.data(),
)
def test_equal_to_sglangs_up_to_the_choice_among_equal_replicas(
    seed, nodes, on_node, per_rank, data
):
    ranks = nodes * on_node
    experts = data.draw(st.integers(per_rank, ranks * per_rank))
    slots_of = random_slots(seed, ranks, per_rank, experts)
    per_node = data.draw(st.sampled_from([None, on_node]))
    ours = dispatch_table(slots_of, ranks, ranks * per_rank, per_node)
    stock = stock_table(slots_of, ranks, ranks * per_rank, per_node)
    kinds = classes(slots_of, ours, ranks, per_rank, per_node)
    assert np.array_equal(kinds, classes(slots_of, stock, ranks, per_rank, per_node))
    forced = (kinds == 0) | ((slots_of != -1).sum(-1) == 1)[None]
    assert np.array_equal(ours[forced], stock[forced])
    assert ours.dtype == stock.dtype


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), ranks=st.integers(2, 12), per_rank=st.integers(1, 4), data=st.data()
)
def test_without_nodes_the_replicas_of_an_expert_serve_equal_numbers_of_ranks(
    seed, ranks, per_rank, data
):
    experts = data.draw(st.integers(per_rank, ranks * per_rank))
    slots_of = random_slots(seed, ranks, per_rank, experts)
    table = dispatch_table(slots_of, ranks, ranks * per_rank)
    served = (table[..., None] == slots_of[None]).sum(0)
    for layer, expert in np.ndindex(*slots_of.shape[:2]):
        counts = served[layer, expert][slots_of[layer, expert] != -1]
        assert counts.sum() == ranks
        assert counts.max() - counts.min() <= 1


def test_rows_of_single_ranks_are_rows_of_the_whole_table():
    slots_of = random_slots(3, 8, 5, 32)
    whole = dispatch_table(slots_of, 8, 40, 4)
    assert np.array_equal(dispatch_table(slots_of, 8, 40, 4, [5, 2]), whole[[5, 2]])


def test_less_imbalanced_than_sglangs_at_ep64():
    placement = skewed_placement(64, 64, 8)
    slots_of = placement.logical_to_physical.astype(np.int64)[:4]
    ours = replica_imbalance(dispatch_table(slots_of, 64, placement.num_slots, 8), slots_of)
    stock = replica_imbalance(stock_table(slots_of, 64, placement.num_slots, 8), slots_of)
    assert ours.mean() < stock.mean()
    assert ours.max() < stock.max()


def test_an_expert_without_a_slot_is_an_error():
    with pytest.raises(PlacementError, match="layer 0 has no slot for expert 1"):
        dispatch_table(np.array([[[0], [-1]]]), 1, 2)


def test_the_hook_answers_as_the_function_that_it_replaces(monkeypatch):
    import inspect
    import types

    import torch
    from sglang.srt import runtime_context
    from sglang.srt.eplb import expert_location

    from moe_placement_plugin.engines.sglang.expert_maps import static_dispatch

    parallel = types.SimpleNamespace(ep_size=8, nnodes=2)
    monkeypatch.setattr(expert_location, "_prefer_same_node_experts", lambda *_: True)
    monkeypatch.setattr(expert_location, "get_parallel", lambda: parallel, raising=False)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    original = inspect.unwrap(expert_location.compute_logical_to_rank_dispatch_physical_map)
    slots_of = torch.from_numpy(random_slots(5, 8, 5, 32))
    call = {
        "logical_to_all_physical_map": slots_of,
        "ep_size": 8,
        "num_physical_experts": 40,
        "ep_rank": 3,
    }
    if "server_args" in inspect.signature(original).parameters:
        call["server_args"] = parallel
    ours, stock = static_dispatch(original, **call), original(**call)
    assert ours.dtype == stock.dtype and ours.shape == stock.shape
    assert torch.equal(ours, torch.from_numpy(dispatch_table(slots_of.numpy(), 8, 40, 4)[3]))
