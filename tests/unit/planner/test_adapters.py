"""Test the planner behind the engines' own signatures."""

import inspect

import numpy as np
import pytest

from .conftest import balance, check_valid

torch = pytest.importorskip("torch", reason="the adapters take the engines' tensors")

from moe_placement_plugin.core.errors import PlacementError  # noqa: E402
from moe_placement_plugin.engines.sglang import eplb_algorithm  # noqa: E402
from moe_placement_plugin.engines.vllm import eplb_policy  # noqa: E402

pytestmark = pytest.mark.every_engine


@pytest.fixture
def load():
    return np.random.default_rng(0).lognormal(0, 0.8, (5, 64)) * 1000


def test_signatures_are_the_engines_own():
    assert list(inspect.signature(eplb_policy.rebalance_experts).parameters) == [
        "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks",
        "old_global_expert_indices",
    ]  # fmt: skip
    assert list(inspect.signature(eplb_algorithm.rebalance_experts).parameters) == [
        "tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups",
        "num_nodes", "algorithm",
    ]  # fmt: skip


def test_signature_of_the_installed_vllm():
    abstract = pytest.importorskip("vllm.distributed.eplb.policy.abstract", reason="needs vLLM")
    theirs = inspect.signature(abstract.AbstractEplbPolicy.rebalance_experts)
    assert list(theirs.parameters) == list(
        inspect.signature(eplb_policy.rebalance_experts).parameters
    )


def test_signature_of_the_installed_sglang():
    algorithms = pytest.importorskip("sglang.srt.eplb.eplb_algorithms", reason="needs SGLang")
    theirs = inspect.signature(algorithms.rebalance_experts)
    assert list(theirs.parameters) == list(
        inspect.signature(eplb_algorithm.rebalance_experts).parameters
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_vllm(load, dtype):
    found = eplb_policy.rebalance_experts(torch.from_numpy(load).to(dtype), 72, 8, 1, 8)
    assert found.dtype == torch.int64 and found.device.type == "cpu"
    check_valid(found.numpy(), [9] * 8, 64)
    assert balance(load, found.numpy(), [9] * 8) > 0.999


def test_vllm_moves_little_from_the_old_placement(load):
    old = eplb_policy.rebalance_experts(torch.from_numpy(load), 72, 8, 1, 8)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.3, load.shape)
    found = eplb_policy.rebalance_experts(torch.from_numpy(drifted), 72, 8, 1, 8, old)
    assert (found != old).float().mean() < 0.3
    assert balance(drifted, found.numpy(), [9] * 8) > 0.98
    # A placement of another size, as elastic scaling gives, is no reason to fail.
    check_valid(
        eplb_policy.rebalance_experts(torch.from_numpy(drifted), 80, 8, 1, 8, old).numpy(),
        [10] * 8,
        64,
    )


@pytest.mark.parametrize("with_old", [False, True])
def test_vllm_keeps_groups_on_nodes(load, with_old):
    old = (
        eplb_policy.rebalance_experts(torch.from_numpy(load[::-1].copy()), 80, 8, 4, 8)
        if with_old
        else None
    )
    found = eplb_policy.rebalance_experts(torch.from_numpy(load), 80, 8, 4, 8, old).numpy()
    check_valid(found, [10] * 8, 64)
    for row in found:
        for group in range(8):
            assert len({int(s) // 20 for s in np.flatnonzero(row // 8 == group)}) == 1


@pytest.mark.parametrize("algorithm", ["deepseek", "deepseek_hierarchical"])
def test_sglang(load, algorithm):
    steps = np.stack([load, load * 2, load[:, ::-1]])
    to_logical, to_physical, count = eplb_algorithm.rebalance_experts(
        torch.from_numpy(steps.copy()), 80, 10, 8, 4, algorithm
    )
    check_valid(to_logical.numpy(), [10] * 8, 64)
    assert count.sum(dim=1).tolist() == [80] * 5
    for layer in range(5):
        for expert in range(64):
            slots = [s for s in to_physical[layer, expert].tolist() if s >= 0]
            assert slots == torch.where(to_logical[layer] == expert)[0].tolist()
            assert len(slots) == count[layer, expert]


def test_refusals(load):
    with pytest.raises(PlacementError, match="73 physical experts on 8 ranks"):
        eplb_policy.rebalance_experts(torch.from_numpy(load), 73, 8, 1, 8)
    with pytest.raises(PlacementError, match="must divide over the nodes"):
        eplb_algorithm.rebalance_experts(
            torch.from_numpy(load[None]), 72, 9, None, 4, "deepseek_hierarchical"
        )


def group_nodes(row, size, slots_per_node):
    return [
        sorted({int(s) // slots_per_node for s in np.flatnonzero(row // size == g)})
        for g in range(row.max() // size + 1)
    ]


def test_vllm_brings_groups_together_and_then_moves_little(load):
    """Begin as the engine does: experts in order, the redundant last, groups on several nodes."""
    linear = torch.from_numpy(np.tile(np.concatenate([np.arange(64), np.arange(16)]), (5, 1)))
    first = eplb_policy.rebalance_experts(torch.from_numpy(load), 80, 8, 4, 8, linear)
    drifted = load * np.random.default_rng(1).lognormal(0, 0.1, load.shape)
    second = eplb_policy.rebalance_experts(torch.from_numpy(drifted), 80, 8, 4, 8, first)
    assert 0 < (second != first).float().mean() < 0.2
    for row, later in zip(first.numpy(), second.numpy()):
        assert all(len(n) == 1 for n in group_nodes(row, 8, 20))
        assert group_nodes(row, 8, 20) == group_nodes(later, 8, 20)
    # Groups do change nodes where keeping them costs a lot.
    lopsided = load.copy()
    lopsided[:, first.numpy()[0, :20]] *= 20
    regrouped = eplb_policy.rebalance_experts(
        torch.from_numpy(lopsided), 80, 8, 4, 8, first
    ).numpy()
    assert any(
        group_nodes(a, 8, 20) != group_nodes(b, 8, 20) for a, b in zip(first.numpy(), regrouped)
    )


def by_vllm(weight, replicas, groups, nodes, ranks):
    table = eplb_policy.rebalance_experts(torch.tensor(weight), replicas, groups, nodes, ranks)
    assert table.shape == (len(weight), replicas)
    return table.numpy()


def by_sglang(weight, replicas, groups, nodes, ranks):
    algorithm = "deepseek_hierarchical" if nodes > 1 else "deepseek"
    table, _, count = eplb_algorithm.rebalance_experts(
        torch.tensor([weight]), replicas, replicas // ranks, groups, nodes, algorithm
    )
    assert table.shape == (len(weight), replicas) and count.shape == (len(weight), len(weight[0]))
    return table.numpy()


@pytest.mark.parametrize("rebalance", [by_vllm, by_sglang])
@pytest.mark.parametrize(
    ("weight", "replicas", "groups", "nodes", "ranks", "counts"),
    [
        (
            [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]],
            16,
            4,
            2,
            8,
            None,
        ),  # the example of DeepSeek's EPLB
        ([[10, 20, 30, 40]], 4, 1, 1, 1, [[1, 1, 1, 1]]),  # one GPU
        ([[50] * 8], 8, 4, 2, 4, [[1] * 8]),  # all alike
        ([[100, 1, 1, 1, 1, 1, 1, 1]], 12, 4, 2, 4, None),  # one hot expert
        ([[20] * 16, [10] * 16, [5] * 16], 16, 8, 4, 8, [[1] * 16] * 3),  # more groups than nodes
        ([[30, 10], [10, 30]], 4, 1, 1, 4, [[3, 1], [1, 3]]),  # two replicas at most would be worse
        ([[0] * 8], 8, 1, 1, 4, [[1] * 8]),  # nothing recorded yet
    ],
)
def test_what_engines_ask_of_an_eplb_algorithm(
    rebalance, weight, replicas, groups, nodes, ranks, counts
):
    """Check shapes, that every expert is there, groups whole, most replicas where the load is."""
    table = rebalance(weight, replicas, groups, nodes, ranks)
    check_valid(table, [replicas // ranks] * ranks, len(weight[0]))
    found = np.stack([np.bincount(row, minlength=len(weight[0])) for row in table])
    assert counts is None or found.tolist() == counts
    for load, count, row in zip(weight, found, table):
        assert count[np.argmax(load)] == count.max()
        if nodes > 1:
            assert all(
                len(n) == 1 for n in group_nodes(row, len(load) // groups, replicas // nodes)
            )
    assert np.array_equal(
        table, rebalance(weight, replicas, groups, nodes, ranks)
    )  # asked from another thread later, the answer is the same
