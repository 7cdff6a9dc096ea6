"""Hold weights, exchange and reload: each process of ``moe-placement bench exchange``.

Two ways to reload are measured. `reload_all` is what engines do: every rank goes through all
tensors of the checkpoint and its loader keeps those of its own slots (SGLang's
``update_weights_from_disk``, to which a lost expert sends all models but DeepSeek). `reload_own`
reads a rank's slots and nothing else, which no engine does.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ....core.placement import Placement
from ....core.topology import Topology
from ....exchange.checkpoint import Checkpoint, CheckpointReader, hugging_face_experts
from ....exchange.communication import Communication
from ....exchange.executor import Exchange
from ....exchange.expert_memory import view_parameter
from ....exchange.peer_memory import PeerMemory
from ....exchange.plan import ExchangePlan
from ....exchange.staging import Memory

torch.set_num_threads(1)


@dataclass(frozen=True)
class Sizes:
    """Say the sizes of the made-up model: bfloat16 experts of ``hidden`` x ``width``."""

    layers: int
    experts: int
    hidden: int
    width: int

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of gate, up and down."""
        return 3 * self.hidden * self.width * 2


def write_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Write a Hugging Face checkpoint of random experts, one file per layer."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    for layer in range(sizes.layers):
        tensors = {}
        for expert in range(sizes.experts):
            for name, shape in (
                ("gate", (sizes.width, sizes.hidden)),
                ("up", (sizes.width, sizes.hidden)),
                ("down", (sizes.hidden, sizes.width)),
            ):
                bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = (
                    bits.view(torch.bfloat16)
                )
        save_file(tensors, folder / f"layer-{layer}.safetensors")


def _empty(sizes: Sizes, slots: int) -> list[list[torch.Tensor]]:
    """Return weights that are there, as a server's are.

    The system finds memory when it is first written, not when it is asked for.
    """
    shapes = ((slots, 2 * sizes.width, sizes.hidden), (slots, sizes.hidden, sizes.width))
    return [
        [torch.full(shape, 1, dtype=torch.bfloat16) for shape in shapes]
        for _ in range(sizes.layers)
    ]


def reload_own(folder: Path, placement: Placement, rank: int, weights) -> None:
    """Read every slot of the rank, and nothing else."""
    checkpoint = Checkpoint(folder)
    reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
    for row, layer in enumerate(placement.layer_ids):
        for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
            reader.read(layer, expert, [t[slot] for t in weights[row]])


_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def reload_all(folder: Path, placement: Placement, rank: int, weights) -> None:
    """Go through all tensors of the checkpoint as an engine's loader does.

    Each is copied into the slots of this rank that hold its expert.
    """
    from safetensors import safe_open

    slots: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, layer in enumerate(placement.layer_ids):
        for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
            slots.setdefault((layer, expert), []).append((row, slot))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                found = _NAME.fullmatch(name)
                if found is None:
                    raise ValueError(f"{file} holds {name}, which is no expert's weight")
                number, expert, part = found.groups()
                for row, slot in slots.get((int(number), int(expert)), ()):
                    into, down = (t[slot] for t in weights[row])
                    half = into.shape[0] // 2
                    {"gate": into[:half], "up": into[half:], "down": down}[part].copy_(tensor)


def _timed(call: Callable[[], object]) -> float:
    """Return the seconds that this rank takes when all begin together."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Job:
    """Say what a process is to measure.

    Attributes:
        port: of the parent's store.
        name: tells this measurement from others that share the store.
        folder: of the checkpoint.
        sizes: of the model.
        plan: the exchange, whose dead ranks end before it.
        staging_bytes: bound on its staging memory.
        read_peers: whether experts are read in the memory of their ranks, as between the ranks of a
            host, rather than sent.
    """

    port: int
    name: str
    folder: Path
    sizes: Sizes
    plan: ExchangePlan
    staging_bytes: int
    read_peers: bool


def measure(rank: int, job: Job, pipe) -> None:
    """Exchange by the job's plan, then reload the same placement in both ways, and compare.

    The parent says when each begins: it may have dropped the checkpoint from the page cache. The
    plan's dead ranks end here.

    Args:
        rank: this process's.
        job: the same in all processes.
        pipe: to the parent.
    """
    plan, live = job.plan, job.plan.live_ranks
    server = dist.TCPStore("127.0.0.1", job.port, is_master=False, wait_for_workers=False)
    store = dist.PrefixStore(job.name, server)
    weights = _empty(job.sizes, plan.old.slots_per_rank[rank])
    reload_own(job.folder, plan.old, rank, weights)
    own = {
        layer: [view_parameter(t, f"layer {layer}") for t in tensors]
        for layer, tensors in zip(plan.old.layer_ids, weights)
    }
    peers = _see_peers(rank, plan, own, store) if job.read_peers else None
    sees = peers is not None and int(peers.reads[rank].sum()) == plan.old.num_ranks - 1
    pipe.send("loaded")
    pipe.recv()  # the parent kills a dead rank's process here
    _join(live.index(rank), len(live), store)
    pipe.send("connected")
    pipe.recv()
    # Loads the compiled kernels, as a server has while its model loads: seconds in a fresh process.
    plan.chunks(job.staging_bytes)
    # Kept from one exchange to the next.
    kept = torch.full((job.staging_bytes,), 1, dtype=torch.uint8)
    memory = Memory(job.staging_bytes, kept=kept)
    reports = []

    def exchange() -> None:
        # No file stays open: what is mapped stays in the page cache.
        reader = None
        if len(plan.reads):
            checkpoint = Checkpoint(job.folder)
            reader = CheckpointReader(checkpoint, hugging_face_experts(checkpoint))
        how = Communication(1, store=store)
        reports.append(Exchange(plan, own, how, memory, reader, peers=peers).run())

    seconds = {"exchange": _timed(exchange)}
    equal = True
    for kind, reload in (("reload all", reload_all), ("reload own", reload_own)):
        fresh = _empty(job.sizes, plan.new.slots_per_rank[rank])
        pipe.send(kind)
        pipe.recv()
        seconds[kind] = _timed(partial(reload, job.folder, plan.new, rank, fresh))
        equal &= _are_equal(weights, fresh)
        del fresh
    report = reports[0]
    raw = _ring(len(live), live.index(rank), report.bytes_received)
    found = {"longest": report.longest, "staging": report.staging_bytes, "chunks": report.chunks}
    pipe.send({"seconds": seconds, "raw": raw, "equal": equal, "sees": sees, **found})
    pipe.recv()


def _see_peers(rank: int, plan: ExchangePlan, own, store: dist.Store) -> PeerMemory:
    """Return what this rank sees of the others' weights; all of them are there."""
    ranks = plan.old.num_ranks
    every = dist.PrefixStore("all", store)
    dist.init_process_group("gloo", store=every, rank=rank, world_size=ranks)
    peers = PeerMemory.of(own, Topology(ranks), dist.group.WORLD, logging.getLogger(__name__))
    dist.destroy_process_group()
    return peers


def _join(rank: int, size: int, store: dist.Store) -> None:
    """Make the default group of the live ranks, connected as in a server that runs for a while."""
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("survivors", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=120),
    )
    connect = torch.zeros(1)
    for peer in range(size):
        dist.broadcast(connect, peer)


def _are_equal(weights, fresh) -> bool:
    """Whether all tensors are, to the bit."""
    return all(
        torch.equal(a.view(torch.int16), b.view(torch.int16))
        for x, y in zip(weights, fresh)
        for a, b in zip(x, y)
    )


def _ring(size: int, rank: int, amount: int) -> float:
    """Return the seconds that plain copies take, from the left neighbour and to the right one.

    They are of as many bytes as the busiest rank received.
    """
    most = torch.tensor([amount], dtype=torch.int64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if size == 1 or not most.item():
        return 0.0
    source, target = (torch.ones(int(most.item()), dtype=torch.uint8) for _ in range(2))

    def copy() -> None:
        sent, got = (
            dist.P2POp(dist.isend, source, (rank + 1) % size),
            dist.P2POp(dist.irecv, target, (rank - 1) % size),
        )
        for work in dist.batch_isend_irecv([sent, got]):
            work.wait()

    return _timed(copy)


def uniform_replicas(
    sizes: Sizes, ranks: int, replicas: int, rng: np.random.Generator
) -> Placement:
    """Return every expert ``replicas`` times, on ranks drawn at random."""
    slots = sizes.experts * replicas // ranks
    table = np.empty((sizes.layers, ranks * slots), np.int64)
    for row in table:
        room = np.full(ranks, slots)
        held: list[list[int]] = [[] for _ in range(ranks)]
        for expert in rng.permutation(sizes.experts).tolist():
            # The emptiest ranks take it, ties at random: so no rank is left that holds an expert
            # twice.
            for rank in np.lexsort((rng.random(ranks), -room))[:replicas].tolist():
                held[rank].append(expert)
                room[rank] -= 1
        row[:] = np.concatenate(held)
    return Placement(table, sizes.experts, (slots,) * ranks)
