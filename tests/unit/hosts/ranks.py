"""Run as one rank on one of several hosts: fork for each job, so that torch is imported once.

    python -m tests.unit.hosts.ranks RANK WORLD ADDRESS

A job is a line of JSON, {"job": name, "port": of the store of rank 0 on ADDRESS, ...}; so is each
answer. A job that does not end in its time is killed, and said to be ``hung``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import numpy as np

TIMEOUT = 3.0
"""Seconds that a transfer, a vote or an answer of the store may take in the trials' exchanges."""


def say(**answer) -> None:
    print(json.dumps(answer), flush=True)


def join(rank: int, world: int, address: str, port: int):
    """Join the gloo group of all hosts; return its store, which rank 0 holds."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    return dist.distributed_c10d._get_default_store()


def open_session(facts: dict | None = None, parcel=None, timeout: float = 60.0):
    """Do what the engines' workers do: agree, and learn which rank lies on which host."""
    import logging

    from moe_placement_plugin.hosts import session

    facts = {"engine": "none", "strategy": "eplb", "digest": ""} | (facts or {})
    log = logging.getLogger("hosts")
    return session.open_session(facts, parcel, timeout, log, "rank {}".format)


def agree(job: dict, rank: int, world: int, address: str) -> dict:
    """Time the agreement on R1's plan, after all ranks are there."""
    import torch.distributed as dist

    from moe_placement_plugin import Placement
    from moe_placement_plugin.formats.packed import pack, unpack

    join(rank, world, address, job["port"])
    plan = Placement(
        np.stack([np.resize(np.random.default_rng(i).permutation(256), 288) for i in range(58)]),
        256,
        (144, 144),
    )
    head = rank == 0
    dist.barrier()
    began = time.perf_counter()
    agreement = open_session(
        {"digest": plan.digest if head else None}, {"plan": pack(plan) if head else None}
    )
    placement = unpack(agreement.parcel["plan"])
    seconds = time.perf_counter() - began
    dist.barrier()  # rank 0 holds the store
    return {
        "seconds": seconds,
        "nodes": agreement.node_of_rank,
        "names": agreement.names(),
        "same": placement.digest == plan.digest,
    }


def moe(job: dict, rank: int, world: int, address: str) -> dict:
    """Route tokens, chosen beforehand, through the staged layer, by a plan of a given locality."""
    import torch
    import torch.distributed as dist

    from moe_placement_plugin import ExpertLoad, PlacementRequest, get_strategy
    from moe_placement_plugin.hosts import session
    from moe_placement_plugin.lab.staged_layer import (
        EpGroup,
        ExpertWeights,
        PlacedExperts,
        Routing,
        StagedMoE,
        find_matmuls,
    )

    join(rank, world, address, job["port"])
    agreement = open_session()
    topology = session.topology(range(world))
    ids = np.load(job["trace"])["topk_ids"]
    experts, hidden = 64, job["hidden"]
    seen, later = (
        ids[:, : ids.shape[1] // 2],
        ids[:, ids.shape[1] // 2 :][:, : job["tokens"] * world],
    )
    chosen = np.zeros((*seen.shape[:2], experts), np.float32)
    np.put_along_axis(chosen, seen, 1, axis=2)
    pairs = np.einsum("lte,ltf->lef", chosen, chosen).astype(np.int64)
    pairs[:, range(experts), range(experts)] = 0
    load = ExpertLoad(chosen.sum(axis=1, dtype=np.int64)[None], coactivation=pairs)
    request = PlacementRequest(len(ids), experts, topology, load=load, locality=job["locality"])
    plan = get_strategy("eplb").place(request)
    rng = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(experts, 32, hidden, generator=rng) / hidden**0.5,
        torch.randn(experts, hidden, 16, generator=rng) / 4,
    )
    group = EpGroup()
    mine = slice(rank * job["tokens"], (rank + 1) * job["tokens"])
    dist.barrier()
    say(ready=True, nodes=agreement.node_of_rank)
    sys.stdin.readline()
    total = 0.0
    for row in range(len(ids)):
        placed, shard = PlacedExperts.of(plan, row, rank), weights.shard(plan, row, rank)
        layer = StagedMoE(
            Routing(experts, ids.shape[2]),
            placed,
            shard,
            find_matmuls("torch"),
            group,
            use_ring=False,
        )
        logits = torch.full((job["tokens"], experts), -10.0).scatter_(
            1, torch.from_numpy(later[row, mine]), 1.0
        )
        x = torch.randn(
            job["tokens"], hidden, generator=torch.Generator().manual_seed(row * world + rank)
        )
        total += float(layer(x, logits).double().abs().sum())
    dist.barrier()
    counts = np.stack([np.bincount(row.ravel(), minlength=experts) for row in later])
    return {"total": total, "balancedness": float(np.mean(plan.balancedness(counts)))}


def exchange(job: dict, rank: int, world: int, address: str) -> dict:
    """Carry an exchange out, and say how.

    Its traffic is measured from the line that the ranks wait for.
    """
    import torch.distributed as dist

    from moe_placement_plugin.core.topology import Topology
    from moe_placement_plugin.hosts import session

    store = join(rank, world, address, job["port"])
    open_session()
    layers, experts, _ = job["exchanged"]
    placements = _with_copies_on_both_hosts(experts, layers)
    found = Moved(
        job,
        rank,
        store,
        placements,
        session.topology(range(world)) if job["near"] else Topology(world),
    )
    dist.barrier()
    say(ready=True)
    sys.stdin.readline()
    result = found.run()
    if result["kind"] == "complete":
        dist.barrier()  # rank 0 holds the store
    return result


def cut(job: dict, rank: int, world: int, address: str) -> dict:
    """Carry an exchange out during which a host vanishes.

    It vanishes when rank ``tells`` has done the share ``moment`` of its pieces of work. The same
    exchange goes before, undisturbed, and tells how much work there is. With ``waits`` that rank
    waits until the host is gone; without, the exchange goes on meanwhile.
    """
    import torch.distributed as dist

    from moe_placement_plugin.hosts import session
    from tests.unit.exchange.cases import random_placement
    from tests.unit.exchange.pieces import Pieces

    store = join(rank, world, address, job["port"])
    open_session()
    rng = np.random.default_rng(job["seed"])
    layers, experts, slots = job["exchanged"]
    placements = [random_placement(rng, layers, experts, [slots] * world) for _ in range(2)]
    topology = session.topology(range(world))
    work = Pieces()
    calm = Moved(job, rank, store, placements, topology, epoch=1)
    dist.barrier()
    undisturbed = work.count(calm.run)
    assert undisturbed["kind"] == "complete", undisturbed["reason"]
    found = Moved(job, rank, store, placements, topology, epoch=2)

    def now() -> None:
        say(now=True)
        if job["waits"]:
            sys.stdin.readline()

    dist.barrier()
    if rank == job["tells"]:
        work.at(job["moment"], now)
    result = found.run()
    if result["kind"] == "complete":
        time.sleep(0.2)  # rank 0 holds the store, and the others may still ask it
    return result | {"undisturbed": undisturbed["seconds"]}


class Moved:
    """Hold an exchange of ``layers`` layers, all of whose bytes are known."""

    def __init__(self, job: dict, rank: int, store, placements, topology, epoch: int = 1):
        from moe_placement_plugin.exchange.communication import Communication
        from moe_placement_plugin.exchange.executor import Exchange
        from moe_placement_plugin.exchange.plan import plan_exchange
        from moe_placement_plugin.exchange.staging import Memory

        self._rank, (self._old, self._new) = rank, placements
        layers, _, self._slots = job["exchanged"]
        self._size = job["bytes"]
        self._weights = [[self._rows(self._old, row)] for row in range(layers)]
        plan = plan_exchange(self._old, self._new, topology)
        self._exchange = Exchange(
            plan,
            self._weights,
            Communication(epoch, store=store, timeout=TIMEOUT),
            Memory(max_layers=job.get("max_layers")),
        )

    def run(self) -> dict:
        """Say how it ended, in which time, which layers are committed and whether each is whole."""
        from moe_placement_plugin.exchange.commit import ExchangeAborted, ExchangeLost

        began = time.monotonic()
        kind, reason = "complete", ""
        try:
            self._exchange.run()
        except (ExchangeAborted, ExchangeLost) as error:
            kind, reason = type(error).__name__, str(error)
        seconds = time.monotonic() - began
        done = self._exchange.metadata.committed
        whole = [
            bool((w == self._rows(self._new if done[row] else self._old, row)).all())
            for row, (w,) in enumerate(self._weights)
        ]
        sent = self._exchange.report.bytes_sent
        return {
            "kind": kind,
            "reason": reason,
            "seconds": seconds,
            "committed": done.tolist(),
            "whole": whole,
            "sent": sent,
        }

    def _rows(self, placement, row: int):
        """Make this rank's slots of a layer, int32 ``[slots, size / 4]``, which name the expert."""
        import torch

        rows = torch.zeros(self._slots, self._size // 4, dtype=torch.int32)
        for slot, expert in enumerate(placement.local_experts(row, self._rank).tolist()):
            rows[slot] = torch.arange(self._size // 4, dtype=torch.int32) * 7 + row * 1000 + expert
        return rows


def _with_copies_on_both_hosts(experts: int, layers: int):
    """Place every expert once on each host, ranks 0, 2 and ranks 1, 3, before and after a swap.

    Neighbours on a host swap what they hold.
    """
    from moe_placement_plugin import Placement

    half = experts // 2
    low, high = list(range(half)), list(range(half, experts))
    old = low + low + high + high  # ranks 0, 1 hold the low half, ranks 2, 3 the high one
    new = high + high + low + low
    return tuple(Placement([row] * layers, experts, (half,) * 4) for row in (old, new))


def hold(job: dict, rank: int, world: int, address: str) -> dict:
    """Wait in a collective for ranks of a host that vanishes, until the watch ends the process."""
    import torch
    import torch.distributed as dist

    join(rank, world, address, job["port"])
    open_session(timeout=job["timeout"])
    dist.barrier()
    say(ready=True)
    while True:
        dist.all_reduce(torch.zeros(1))
        time.sleep(0.01)


JOBS = {function.__name__: function for function in (agree, moe, exchange, cut, hold)}


def main() -> None:
    import torch.distributed  # noqa: F401

    import moe_placement_plugin.exchange.executor  # noqa: F401

    rank, world, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    say(started=rank)
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                say(done=JOBS[job["job"]](job, rank, world, address))
            except BaseException:
                say(failed=traceback.format_exc())
            # Connections of a broken group are not worth waiting for.
            os._exit(0)
        deadline = time.monotonic() + job.get("limit", 60)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                say(hung=job["job"])
                break
            time.sleep(0.01)
        say(ended=True)


if __name__ == "__main__":
    main()
