"""Measure plain copies, exchanges and the pauses of rebalances on a `MovedModel`."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from .... import ExpertLoad
from ....exchange import peer_reads
from ....rebalancing.policy import RebalancePolicy
from ....rebalancing.rebalancer import Rebalancer
from ....rebalancing.tables import EngineRanks
from .model import MovedModel, logger


def ways(model: MovedModel) -> Iterator[str]:
    """Switch to each way that experts come from another rank in: sent, then read if it can be seen.

    The last one is what engines get. GPUs are read by a kernel as well, for comparison
    (`peer_reads.READ_SINGLY`).
    """
    yield "sent"
    if not model.exchanger.look_at_peers(model.cpu_group).reads.any():
        return
    if model.device.type == "cuda":
        size, peer_reads.READ_SINGLY = peer_reads.READ_SINGLY, sys.maxsize
        yield "read by a kernel"
        peer_reads.READ_SINGLY = size
    yield "read"


def plain_copies(model: MovedModel, repeats: int, amount: int) -> dict[str, float]:
    """Return the bytes per second that each rank receives, in pieces of 256 MB."""
    piece = min(amount, 256 << 20)
    number = max(1, amount // piece)
    source = torch.ones(piece, dtype=torch.uint8, device=model.device)

    def rate(call: Callable[[], None]) -> float:
        call()
        return number * piece / statistics.median(model.timed(call) for _ in range(repeats))

    rates = {}
    if model.device.type == "cuda" and torch.cuda.device_count() >= model.ranks:
        other = torch.device("cuda", (model.device.index + 1) % model.ranks)
        target = torch.empty(piece, dtype=torch.uint8, device=other)

        def copy() -> None:
            for _ in range(number):
                target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(target.device)

        rates["peer copy"] = rate(copy)
    into = torch.empty_like(source)

    def send() -> None:
        for _ in range(number):
            pair = [
                dist.P2POp(dist.isend, source, (model.rank + 1) % model.ranks),
                dist.P2POp(dist.irecv, into, (model.rank - 1) % model.ranks),
            ]
            for work in dist.batch_isend_irecv(pair):
                work.wait()

    rates["send and receive"] = rate(send)
    return rates


def move_all(model: MovedModel, repeats: int, scattered: bool = False) -> dict[str, float]:
    """Move nearly every slot to another rank, and back.

    Args:
        model: what is moved.
        repeats: of the way there and back.
        scattered: into slots in any order.
    """
    there = np.roll(model.first, model.slots, axis=1)
    if scattered:
        rng = np.random.default_rng(1)
        there = rng.permuted(there.reshape(-1, model.slots), axis=1).reshape(there.shape)
    layers = range(model.shape.layers)
    moves = model.exchanger.plan(model.first, there, layers)
    busiest = int((moves.incoming * moves.expert_bytes[:, None]).sum(axis=0).max())
    times, longest = [], []
    for turn in range(2 * repeats + 2):
        goal = there if turn % 2 == 0 else model.first
        taken = model.timed(lambda goal=goal: model.move(goal))
        if turn >= 2:  # the first way there and back warms up
            times.append(taken)
            longest.append(model.exchanger.last.longest)
    model.verify(layers)
    seconds = statistics.median(times)
    report = model.exchanger.last
    return {
        "bytes": busiest,
        "seconds": seconds,
        "bytes_per_s": busiest / seconds,
        "longest_chunk": statistics.median(longest),
        "chunks": report.chunks,
        "staging_bytes": report.staging_bytes,
    }


def windows(model: MovedModel, repeats: int) -> list[np.ndarray]:
    """Draw loads ``[layers, experts]`` that drift, alike on all ranks."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1.0, (model.shape.layers, model.shape.experts))
    found = []
    for _ in range(repeats + 2):
        found.append(np.rint(1e5 * share).astype(np.int64) + 1)
        share = share * rng.lognormal(0, 0.6, share.shape)
    return found


def pause_ours(model: MovedModel, repeats: int) -> dict[str, float]:
    """Time a rebalance with our planner and exchange after each window."""
    sizes = list(model.exchanger.expert_bytes.values())
    rebalancer = Rebalancer(
        RebalancePolicy(min_gain=0.0, hysteresis=0.0),
        range(model.shape.layers),
        sizes,
        logger,
        model.exchanger.topology,
    )
    times, parts, moved = [], [], []
    for load in windows(model, repeats):
        spent: dict[str, float] = {}

        def rebalance(load=load, spent=spent) -> None:
            began = time.perf_counter()
            ranks = EngineRanks(model.ranks)
            proposal = rebalancer.propose(ExpertLoad(load[None]), model.table, ranks)
            spent["plan"] = time.perf_counter() - began
            old = model.table
            model.move(np.asarray(proposal.table, dtype=np.int64), proposal.exchange)
            spent["bytes"] = proposal.decision.bytes
            spent["exchange"] = time.perf_counter() - began - spent["plan"]
            model.verify(np.flatnonzero((old != model.table).any(axis=1)).tolist())
            spent["verify"] = time.perf_counter() - began - spent["plan"] - spent["exchange"]

        times.append(model.timed(rebalance))
        parts.append(spent)
        moved.append(spent["bytes"])
    return _figures(times, moved) | {
        name: statistics.median(p[name] for p in parts[2:])
        for name in ("plan", "exchange", "verify")
    }


def pause_vllm(model: MovedModel, repeats: int, kind: str) -> dict[str, float]:
    """Time a rebalance after the same windows with vLLM's default policy and its own exchange.

    Args:
        model: what is moved.
        repeats: windows that count.
        kind: ``torch_gloo`` or ``torch_nccl``, vLLM's name of what moves the weights.
    """
    from vllm.distributed.eplb import eplb_communicator, rebalance_execute
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    if kind == "torch_gloo":
        communicator = eplb_communicator.TorchDistGlooStagedEplbCommunicator(
            cpu_group=model.cpu_group
        )
    else:
        communicator = eplb_communicator.TorchDistNcclEplbCommunicator(ep_group=model.group)
    buffer = [torch.empty_like(w) for w in model.weights[0]]
    physical = model.slots * model.ranks
    times, moved = [], []
    for load in windows(model, repeats):
        old = model.table

        def rebalance(load=load) -> None:
            before = torch.from_numpy(model.table)
            table = EPLB_POLICIES["default"].rebalance_experts(
                torch.from_numpy(load), physical, 1, 1, model.ranks, before
            )
            rebalance_execute.rearrange_expert_weights_inplace(
                before, table, model.weights, buffer, model.group, communicator
            )
            model.table = table.numpy()

        times.append(model.timed(rebalance))
        arrived = [
            np.setdiff1d(b, a).size
            for a, b in zip(old.reshape(-1, model.slots), model.table.reshape(-1, model.slots))
        ]
        moved.append(sum(arrived) * model.exchanger.expert_bytes[0])
    model.verify(range(model.shape.layers))
    return _figures(times, moved)


def _figures(times: list[float], moved: list[float]) -> dict[str, float]:
    """Summarise pauses and bytes; the first two windows warm up."""
    return {
        "seconds": statistics.median(times[2:]),
        "longest": max(times[2:]),
        "bytes": statistics.median(moved[2:]),
    }
