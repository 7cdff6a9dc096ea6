"""What each process of ``moe-placement bench exchange`` does: hold weights, lose peers, exchange, reload, compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..exchange.checkpoint import Checkpoint, CheckpointReader, hugging_face_experts
from ..exchange.executor import Exchange
from ..exchange.plan import ExchangePlan
from ..placement import Placement

torch.set_num_threads(1)


@dataclass(frozen=True)
class Sizes:
    """Of the made-up model: bfloat16 experts of ``hidden`` x ``width``."""

    layers: int
    experts: int
    hidden: int
    width: int

    @property
    def expert_bytes(self) -> int:
        """Gate, up and down."""
        return 3 * self.hidden * self.width * 2


def write_checkpoint(folder: Path, sizes: Sizes) -> None:
    """A Hugging Face checkpoint of random experts, one file per layer."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for layer in range(sizes.layers):
        tensors = {}
        for expert in range(sizes.experts):
            for name, shape in (("gate", (sizes.width, sizes.hidden)), ("up", (sizes.width, sizes.hidden)), ("down", (sizes.hidden, sizes.width))):
                bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = bits.view(torch.bfloat16)
        save_file(tensors, folder / f"layer-{layer}.safetensors")


def _empty(sizes: Sizes, slots: int) -> list[list[torch.Tensor]]:
    return [
        [
            torch.zeros((slots, 2 * sizes.width, sizes.hidden), dtype=torch.bfloat16),
            torch.zeros((slots, sizes.hidden, sizes.width), dtype=torch.bfloat16),
        ]
        for _ in range(sizes.layers)
    ]


def _reload(folder: Path, placement: Placement, rank: int, weights) -> None:
    """Read every slot of the rank, as a server that starts does."""
    checkpoint = Checkpoint(folder)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    for row, layer in enumerate(placement.layer_ids):
        for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
            reader.read(layer, expert, [t[slot] for t in weights[row]])


def _timed(call: Callable[[], object]) -> float:
    """Seconds that this rank takes when all begin together."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(rank: int, port: int, name: str, pipe, folder: Path, sizes: Sizes, plan: ExchangePlan, max_layers: int | None) -> None:
    """One process: exchange by ``plan`` (whose dead ranks end here), then a full reload of the same placement, and compare."""
    store = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    weights = _empty(sizes, plan.old.slots_per_rank[rank])
    _reload(folder, plan.old, rank, weights)
    pipe.send("loaded")
    if not plan.live[rank]:
        pipe.recv()  # the parent kills this process here
        return
    pipe.recv()
    live = plan.live_ranks
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("survivors", store), rank=live.index(rank), world_size=len(live), timeout=timedelta(seconds=120)
    )
    checkpoint = Checkpoint(folder)
    found = Exchange(
        plan, weights, epoch=1, store=store, max_layers=max_layers, reader=CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    )
    seconds = _timed(found.run)
    fresh = _empty(sizes, plan.new.slots_per_rank[rank])
    reload = _timed(lambda: _reload(folder, plan.new, rank, fresh))
    equal = all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for x, y in zip(weights, fresh) for a, b in zip(x, y))
    raw = _ring(len(live), live.index(rank), found.report.bytes_received)
    report = found.report
    pipe.send(
        {"seconds": seconds, "reload": reload, "raw": raw, "equal": equal}
        | {"longest": report.longest, "staging": report.staging_bytes, "chunks": report.chunks}
    )
    pipe.recv()


def _ring(size: int, rank: int, amount: int) -> float:
    """Seconds that plain copies take: as many bytes as the busiest rank received, from the left neighbour and to the right one."""
    most = torch.tensor([amount], dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if size == 1 or not most.item():
        return 0.0
    source, target = (torch.ones(int(most.item()), dtype=torch.uint8) for _ in range(2))

    def copy() -> None:
        sent, got = dist.P2POp(dist.isend, source, (rank + 1) % size), dist.P2POp(dist.irecv, target, (rank - 1) % size)
        for work in dist.batch_isend_irecv([sent, got]):
            work.wait()

    return _timed(copy)


def uniform_replicas(sizes: Sizes, ranks: int, replicas: int, rng: np.random.Generator) -> Placement:
    """Every expert ``replicas`` times, on ranks drawn at random."""
    slots = sizes.experts * replicas // ranks
    table = np.empty((sizes.layers, ranks * slots), np.int64)
    for row in table:
        room = np.full(ranks, slots)
        held: list[list[int]] = [[] for _ in range(ranks)]
        for expert in rng.permutation(sizes.experts).tolist():
            # The emptiest ranks take it, ties at random: so no rank is left that holds an expert twice.
            for rank in np.lexsort((rng.random(ranks), -room))[:replicas].tolist():
                held[rank].append(expert)
                room[rank] -= 1
        row[:] = np.concatenate(held)
    return Placement(table, sizes.experts, (slots,) * ranks)
