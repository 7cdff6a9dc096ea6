"""Test what SGLang's schedulers do about other hosts, in two processes without an engine."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from datetime import timedelta

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.engines.common.settings import HostSettings, Settings
from tests.support.sglang_settings import make_settings

PLAN = Placement(
    [np.random.default_rng(layer).permutation(16) for layer in range(3)],
    16,
    (8, 8),
    (1, 2, 3),
    "eplb",
    {"node_of_rank": [0, 1]},
)
STALE = Placement(
    [np.random.default_rng(layer + 9).permutation(16) for layer in range(3)],
    16,
    (8, 8),
    (1, 2, 3),
    "eplb",
)


def scheduler(rank: int, port: int, cases: list[Settings], pipe) -> None:
    """Run `hosts.agree` on one host, case after case.

    It sends the digest of the placement that each ends with, or the error.
    """
    import os

    import torch.distributed as dist

    from moe_placement_plugin.engines.sglang import hosts
    from moe_placement_plugin.engines.sglang.state import STATE

    os.environ["NCCL_HOSTID"] = f"host {rank}"
    hosts.real_topology = lambda: None  # needs SGLang's own groups
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    for number, asked in enumerate(cases):
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"world {number}", store), rank=rank, world_size=2
        )
        STATE.settings = asked
        try:
            hosts.agree(asked)
            # A second model runner of the process asks again: nothing happens.
            found = hosts.agree(STATE.settings)
            pipe.send((found.plan.digest, found.adopts, hosts.session.agreed().node_of_rank))
        except Exception:
            pipe.send(traceback.format_exc())
        hosts.session.close_session()
        dist.barrier()
        dist.destroy_process_group()


def on_two_hosts(cases: list[tuple[Settings, Settings]]) -> list[tuple]:
    """Return what both hosts end with, case by case."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, pipes, processes = mp.get_context("spawn"), [], []
    for rank in range(2):
        mine, theirs = context.Pipe()
        processes.append(
            context.Process(
                target=scheduler,
                args=(rank, store.port, [case[rank] for case in cases], theirs),
                daemon=True,
            )
        )
        processes[-1].start()
        pipes.append(mine)
    try:
        results = []
        for _ in cases:
            assert all(pipe.poll(100) for pipe in pipes)
            results.append(tuple(pipe.recv() for pipe in pipes))
        return results
    finally:
        for process in processes:
            process.kill()


def settings_of(**more) -> Settings:
    hosts = HostSettings(20.0, 2, more.get("adopts", False), more.get("error"))
    return make_settings(
        more.get("strategy", "eplb"),
        more.get("placement", PLAN),
        source="/plans/plan.json",
        hosts=hosts,
    )


DIFFERENT = {
    f"has placement {STALE.digest[:12]} from /plans/plan.json, the head has placement "
    f"{PLAN.digest[:12]}": {"placement": STALE},
    "cannot have what was asked for: /plans/plan.json is a plan for 8 ranks": {
        "placement": None,
        "error": "/plans/plan.json is a plan for 8 ranks",
    },
    "strategy zigzag, the head has eplb": {"strategy": "zigzag"},
}
"""What the message says -> what the second host has."""


@pytest.fixture(scope="module")
def results():
    there = [{"placement": None, "adopts": True}, *DIFFERENT.values()]
    return on_two_hosts([(settings_of(), settings_of(**more)) for more in there])


def test_the_placement_of_the_head_is_taken(results):
    assert results[0] == ((PLAN.digest, False, (0, 1)),) * 2, results[0]


@pytest.mark.parametrize("words", DIFFERENT)
def test_hosts_that_differ_all_stop_with_one_message(results, words):
    first, second = results[1 + list(DIFFERENT).index(words)]
    assert isinstance(first, str) and isinstance(second, str), (first, second)
    assert (
        words in first
        and first.rpartition("PlacementError: ")[2] == second.rpartition("PlacementError: ")[2]
    )
