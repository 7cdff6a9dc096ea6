"""Which rank lies on which host: by the engine's arguments, and afterwards by what ranks say."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement, Topology
from moe_placement_plugin.engines.vllm import hosts
from moe_placement_plugin.hosts import session
from moe_placement_plugin.hosts.handshake import Agreement
from moe_placement_plugin.rebalancing.policy import RebalancePolicy
from moe_placement_plugin.rebalancing.rebalancer import Rebalancer
from moe_placement_plugin.rebalancing.tables import EngineRanks

from .stores import statement

pytest.importorskip("torch", reason="the helpers of these tests keep a store")


def parallel(**more):
    """A ``ParallelConfig`` of vLLM, as far as it is looked at."""
    fields = {
        "use_ray": False,
        "data_parallel_backend": "mp",
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "data_parallel_rank": 0,
        "distributed_executor_backend": "mp",
        "nnodes": 1,
        "node_rank": 0,
    }
    return SimpleNamespace(**fields | more)


CASES = {
    "one host": (parallel(), False, False, True),
    "--nnodes 2, the head": (parallel(nnodes=2), True, True, True),
    "--nnodes 2, the other": (parallel(nnodes=2, node_rank=1), True, True, False),
    "data parallel on one host": (
        parallel(data_parallel_size=4, data_parallel_size_local=4),
        False,
        False,
        True,
    ),
    "data parallel hosts, the head": (
        parallel(data_parallel_size=4, data_parallel_size_local=2),
        True,
        True,
        True,
    ),
    "data parallel hosts, the other": (
        parallel(data_parallel_size=4, data_parallel_size_local=2, data_parallel_rank=2),
        True,
        True,
        False,
    ),
    "Ray": (parallel(use_ray=True, distributed_executor_backend="ray"), True, False, True),
    "data parallel with Ray": (
        parallel(data_parallel_backend="ray", data_parallel_size=4),
        True,
        False,
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_host_is_among_others(name):
    config, spans, everywhere, head = CASES[name]
    assert (
        hosts.spans_hosts(config),
        hosts.resolves_on_every_host(config),
        hosts.is_head(config),
    ) == (spans, everywhere, head)


def test_an_external_launcher_says_its_rank_in_the_environment(monkeypatch):
    config = parallel(distributed_executor_backend="external_launcher")
    monkeypatch.setenv("RANK", "3")
    assert hosts.resolves_on_every_host(config) and not hosts.is_head(config)
    monkeypatch.setenv("RANK", "0")
    assert hosts.is_head(config)


def test_the_nodes_that_a_static_plan_is_made_for():
    assert hosts.planned_topology(parallel(nnodes=2), 8) == Topology.even(8, 2)
    assert hosts.planned_topology(
        parallel(data_parallel_size=4, data_parallel_size_local=1), 8
    ) == Topology.even(8, 4)
    assert (
        hosts.planned_topology(parallel(), 8)
        == Topology(8)
        == hosts.planned_topology(parallel(use_ray=True), 8)
    )
    assert hosts.planned_topology(parallel(nnodes=3), 8) == Topology(8)  # no equal hosts: not known


@pytest.fixture
def two_hosts(monkeypatch):
    """Four ranks that said they lie on two hosts, in turn."""
    statements = tuple(statement(rank, host=rank % 2) for rank in range(4))
    monkeypatch.setattr(session._session, "agreement", Agreement(statements, None, seconds=0.001))


def test_what_ranks_said_is_what_an_ep_group_gets(two_hosts):
    assert session.topology(range(4)).node_of_rank == (0, 1, 0, 1)
    assert session.topology([3, 1]).node_of_rank == (0, 0) and session.topology(
        [3, 2]
    ).node_of_rank == (0, 1)
    assert session.host_names() == "2: node0 (10.0.0.1), ranks 0, 2; node1 (10.0.0.2), ranks 1, 3"


def test_a_plan_for_other_nodes_is_warned_about(two_hosts, caplog):
    log = logging.getLogger("hosts-test")
    # The same but for their numbers.
    session.warn_about_nodes([1, 0, 1, 0], session.topology(range(4)), log)
    session.warn_about_nodes(None, session.topology(range(4)), log)
    assert not caplog.records
    session.warn_about_nodes([0, 0, 1, 1], session.topology(range(4)), log)
    assert "made for EP ranks on nodes [0, 0, 1, 1], they lie on [0, 1, 0, 1]" in caplog.text


@pytest.mark.slow
def test_a_rebalance_keeps_groups_on_the_real_nodes(two_hosts):
    """EPLB's planner and the exchange's estimate get the nodes that ranks named, not equal runs."""
    topology = session.topology(range(4))
    counts = np.random.default_rng(0).zipf(1.3, (1, 2, 16)).clip(max=50) * 100
    old = np.tile(np.arange(16), (2, 1))
    rebalancer = Rebalancer(
        RebalancePolicy(min_gain=0, hysteresis=0, max_phase_loss=0.9),
        (0, 1),
        1000,
        logging.getLogger("hosts-test"),
        topology,
    )
    ranks = EngineRanks(4, groups=4, nodes=2)
    table, _, exchange = rebalancer.propose(ExpertLoad(counts), old, ranks)
    nodes = np.array(topology.node_of_rank)[Placement(table, 16, (4,) * 4).rank_of_slot]
    for row in table:
        where = nodes[np.argsort(row)]
        assert all(len(set(where[group * 4 : group * 4 + 4])) == 1 for group in range(4))
    assert exchange is not None and exchange.topology == topology
