"""The planner behind the engines' own signatures."""

import inspect

import numpy as np
import pytest

from .conftest import balance, check_valid

torch = pytest.importorskip("torch", reason="the adapters take the engines' tensors")

from moe_placement_plugin.engines.sglang import eplb_algorithm  # noqa: E402
from moe_placement_plugin.engines.vllm import eplb_policy  # noqa: E402
from moe_placement_plugin.errors import PlacementError  # noqa: E402


@pytest.fixture
def load():
    return np.random.default_rng(0).lognormal(0, 0.8, (5, 64)) * 1000


def test_signatures_are_the_engines_own():
    assert list(inspect.signature(eplb_policy.rebalance_experts).parameters) == [
        "weight", "num_replicas", "num_groups", "num_nodes", "num_ranks", "old_global_expert_indices",
    ]  # fmt: skip
    assert list(inspect.signature(eplb_algorithm.rebalance_experts).parameters) == [
        "tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups", "num_nodes", "algorithm",
    ]  # fmt: skip


def test_signature_of_the_installed_vllm():
    abstract = pytest.importorskip("vllm.distributed.eplb.policy.abstract", reason="needs vLLM")
    theirs = inspect.signature(abstract.AbstractEplbPolicy.rebalance_experts)
    assert list(theirs.parameters) == list(inspect.signature(eplb_policy.rebalance_experts).parameters)


def test_signature_of_the_installed_sglang():
    algorithms = pytest.importorskip("sglang.srt.eplb.eplb_algorithms", reason="needs SGLang")
    theirs = inspect.signature(algorithms.rebalance_experts)
    assert list(theirs.parameters) == list(inspect.signature(eplb_algorithm.rebalance_experts).parameters)


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
    check_valid(eplb_policy.rebalance_experts(torch.from_numpy(drifted), 80, 8, 1, 8, old).numpy(), [10] * 8, 64)


@pytest.mark.parametrize("with_old", [False, True])
def test_vllm_keeps_groups_on_nodes(load, with_old):
    old = eplb_policy.rebalance_experts(torch.from_numpy(load[::-1].copy()), 80, 8, 4, 8) if with_old else None
    found = eplb_policy.rebalance_experts(torch.from_numpy(load), 80, 8, 4, 8, old).numpy()
    check_valid(found, [10] * 8, 64)
    for row in found:
        for group in range(8):
            assert len({int(s) // 20 for s in np.flatnonzero(row // 8 == group)}) == 1


@pytest.mark.parametrize("algorithm", ["deepseek", "deepseek_hierarchical"])
def test_sglang(load, algorithm):
    steps = np.stack([load, load * 2, load[:, ::-1]])
    to_logical, to_physical, count = eplb_algorithm.rebalance_experts(torch.from_numpy(steps.copy()), 80, 10, 8, 4, algorithm)
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
        eplb_algorithm.rebalance_experts(torch.from_numpy(load[None]), 72, 9, None, 4, "deepseek_hierarchical")
