"""Test our exchange in vLLM's sync and async mode, between real processes.

They use vLLM's own communicator. Test also which steps were prompts.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
import torch  # noqa: E402

from moe_placement_plugin.engines.common.options import REBALANCE  # noqa: E402
from moe_placement_plugin.engines.vllm import eplb, eplb_phases, eplb_policy, state  # noqa: E402
from moe_placement_plugin.exchange.watchdog import Watchdog  # noqa: E402
from moe_placement_plugin.rebalancing.exchanger import ExchangeLimits  # noqa: E402
from moe_placement_plugin.rebalancing.rebalance import Rebalance  # noqa: E402
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer, policy_from  # noqa: E402
from tests.unit.exchange.conftest import ranks  # noqa: E402, F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def outcomes(ranks):  # noqa: F811
    from .exchange_ranks import all_of_it

    return ranks.run(all_of_it, 3, range(6), timeout=300)


def test_sync_and_async_mode_end_where_vllms_own_do(outcomes):
    for result, _ in outcomes:
        assert all(result["sync"]) and all(result["async"]) and len(result["async"]) == 6
        assert result["unchanged layers sent"] == 0


def test_what_was_weighed_is_carried_out_where_vllm_asks_for_it_and_nothing_else(outcomes):
    for result, _ in outcomes:
        assert all(result["weighed"]) and all(result["another table than was weighed"])
        assert result["planned anew"] == {"weighed": 0, "another table than was weighed": 6}


def test_a_rank_that_fails_leaves_every_layers_map_and_weights_in_agreement(outcomes):
    results = [failure for _, failure in outcomes]
    assert all("the link is down" in reason for reason, *_ in results)
    assert all(agree and whole for _, agree, whole, _ in results)
    assert {done for *_, done in results} == {2}  # the layer that stays, and the first chunk


def test_what_a_step_is():
    assert eplb_phases.phase_of_requests(np.array([True, True])) == "prefill"
    assert eplb_phases.phase_of_requests(np.array([False, True])) == "mixed"
    assert eplb_phases.phase_of_requests(np.array([False])) == "decode"
    assert eplb_phases.phase_of_requests(np.array([], dtype=bool)) == "mixed"


class Eplb(SimpleNamespace):
    """Stand for vLLM's EplbState, as far as phases go: a window of four steps."""

    def _should_record_current_step(self, log_stats):
        return self.recording


@pytest.fixture
def begun(monkeypatch):
    """Begin with EPLB on a server: return what the process knows of it."""

    def begin(owner, *models) -> state.Eplb:
        found = state.Eplb(owner, 30.0, ExchangeLimits(), list(models))
        monkeypatch.setattr(state.STATE, "eplb", found)
        return found

    return begin


def planned_model(of_vllm=None) -> state.EplbModel:
    """Return a model of two layers that we plan for, whose rebalance has begun."""
    planner = Rebalancer(policy_from({}, REBALANCE.flag), range(2), 1000, eplb.logger)
    rebalance = Rebalance(Watchdog(), rebalancer=planner)
    return state.EplbModel(of_vllm, rebalancer=planner, rebalance=rebalance)


def test_the_window_is_told_apart_by_phase(monkeypatch, begun):
    from vllm.distributed import parallel_state

    monkeypatch.setattr(parallel_state, "get_ep_group", lambda: SimpleNamespace(device_group=None))
    summed = []
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, group: summed.append(tensor.mul_(2))
    )
    table = torch.tensor([[0, 1, 2, 0], [2, 1, 0, 1]])
    window = torch.arange(4 * 2 * 4, dtype=torch.int32).view(4, 2, 4)
    of_vllm = SimpleNamespace(
        expert_load_window=window,
        physical_to_logical_map=table,
        logical_replica_count=torch.ones(2, 3, dtype=torch.long),
        model=SimpleNamespace(num_moe_layers=2),
    )
    server = Eplb(
        expert_load_window_size=4,
        expert_load_window_step=0,
        recording=True,
        model_states={"m": of_vllm},
    )
    model = planned_model(of_vllm)
    known = begun(server, model)
    runner = SimpleNamespace(eplb_state=server)
    for step, (prompts, dummy) in enumerate(
        [([True], False), ([False, False], False), ([False, True], True), ([False], False)]
    ):
        eplb_phases.note_step(runner, np.array(prompts))
        server.expert_load_window_step = step
        eplb_phases.note_recorded(known, dummy, False)
    (load,) = eplb_phases.loads_by_phase(known)
    logical = np.zeros((4, 2, 3), dtype=np.int64)
    for layer in range(2):
        for slot, expert in enumerate(table[layer].tolist()):
            logical[:, layer, expert] += window[:, layer, slot].numpy()
    assert load.tolist() == [
        (2 * logical[0]).tolist(),
        (2 * (logical[1] + logical[3])).tolist(),
        (2 * logical[2]).tolist(),
    ]

    group = SimpleNamespace(device_group=None, world_size=2, rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_ep_group", lambda: group)
    eplb._begin_rebalance(known, Watchdog(), is_profile=False)
    assert model.rebalance.peers == (1,) and model.rebalance.rebalancer is model.rebalancer
    told = eplb_policy.load_by_phase(model, load.sum(axis=0).astype(float))
    assert told.phases == ("prefill", "decode", "mixed")
    # Those of another window than that which vLLM has added up.
    model.rebalance.phases = load + 1
    told = eplb_policy.load_by_phase(model, load.sum(axis=0).astype(float))
    assert told.phases == ("mixed",)
    eplb._begin_rebalance(known, Watchdog(), is_profile=True)
    assert model.rebalance is None


@pytest.mark.parametrize(
    "how, expected",
    [
        ({}, 2),  # tensor parallel ranks route the same tokens
        ({"is_sequence_parallel": True}, 1),  # each routes its share
        ({"supports_internal_mk": False}, 4),  # tokens are gathered before they are routed
        ({"supports_internal_mk": False, "dp_size": 1, "ep_size": 2}, 2),
        ({"dp_size": 1, "ep_size": 4}, 4),
        ({"pcp_size": 2, "ep_size": 8, "use_all2all_kernels": True}, 2),
        ({"pcp_size": 2, "ep_size": 8}, 4),
        ({"is_sequence_parallel": True, "supports_internal_mk": False}, 4),
    ],
)
def test_a_token_counts_once_however_many_ranks_have_counted_it(how, expected):
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    has = {"dp_size": 2, "ep_size": 4, "pcp_size": 1, "use_all2all_kernels": False, **how}
    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    parallel = SimpleNamespace(**has)
    runner.moe_config = SimpleNamespace(
        moe_parallel_config=parallel,
        dp_size=has["dp_size"],
        pcp_size=has["pcp_size"],
        is_sequence_parallel=has.get("is_sequence_parallel", False),
    )
    method = SimpleNamespace(supports_internal_mk=has.get("supports_internal_mk", True))
    runner.__dict__["routed_experts"] = SimpleNamespace(quant_method=method)
    counted = eplb_policy.ranks_that_count_a_token
    assert counted(torch.nn.Sequential(runner)) == expected
    assert counted(torch.nn.Sequential()) == 1


def test_the_load_is_divided_by_the_ranks_that_counted_it():
    model = planned_model()
    counts = np.array([[8.0, 4, 0], [4, 4, 4]])
    assert eplb_policy.load_by_phase(model, counts).total.tolist() == counts.tolist()
    model.counted_by = 4
    assert eplb_policy.load_by_phase(model, counts).total.tolist() == (counts / 4).tolist()
    model.rebalance.phases = np.stack([counts, 0 * counts, 0 * counts])
    assert eplb_policy.load_by_phase(model, counts).total.tolist() == (counts / 4).tolist()


def test_maps_are_vllms():
    from vllm.distributed.eplb.eplb_state import compute_logical_maps

    from moe_placement_plugin.engines.vllm.eplb_exchange import _logical_maps

    original = getattr(compute_logical_maps, "__wrapped__", compute_logical_maps)
    ours = _logical_maps(lambda *args: pytest.fail("vLLM's own was asked"))
    rng = np.random.default_rng(0)
    for case in range(8):
        table = np.stack(
            [
                rng.permutation(np.concatenate([np.arange(7), rng.integers(7, size=5)]))
                for _ in range(3)
            ]
        )
        if case % 2:  # slots of ranks that come hold nothing yet
            table[:, rng.integers(12, size=2)] = -1
        table = torch.from_numpy(table)
        for given in (table, table[1]):
            for a, b in zip(ours(given, 7), original(given, 7)):
                assert a.equal(b) and a.dtype == b.dtype
