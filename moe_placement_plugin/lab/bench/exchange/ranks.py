"""What each process of ``moe-placement bench exchange`` does: hold weights, lose peers, exchange, reload, compare.

Two ways to reload are measured. `reload_all` is what engines do: every rank goes through all tensors of the checkpoint and its loader keeps
those of its own slots (SGLang's ``update_weights_from_disk``, to which a lost expert sends all models but DeepSeek). `reload_own` reads a
rank's slots and nothing else, which no engine does.
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
    """Weights that are there, as a server's are: the system finds memory when it is first written, not when it is asked for."""
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
    """Go through all tensors of the checkpoint as an engine's loader does, and copy each into the slots of this rank that hold its expert."""
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
    """Seconds that this rank takes when all begin together."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(
    rank: int,
    port: int,
    name: str,
    pipe,
    folder: Path,
    sizes: Sizes,
    plan: ExchangePlan,
    staging_bytes: int,
    read_peers: bool,
) -> None:
    """One process: exchange by ``plan`` (whose dead ranks end here), then both reloads of the same placement, and compare.

    The parent says when each begins: it may have dropped the checkpoint from the page cache. Experts are sent, or read in the memory of their
    ranks (``read_peers``), as between the ranks of a host.
    """
    store = dist.PrefixStore(
        name, dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    )
    weights = _empty(sizes, plan.old.slots_per_rank[rank])
    reload_own(folder, plan.old, rank, weights)
    own = {
        layer: [view_parameter(t, f"layer {layer}") for t in tensors]
        for layer, tensors in zip(plan.old.layer_ids, weights)
    }
    peers = None
    if read_peers:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("all", store), rank=rank, world_size=plan.old.num_ranks
        )
        peers = PeerMemory.of(
            own, Topology(plan.old.num_ranks), dist.group.WORLD, logging.getLogger(__name__)
        )
        dist.destroy_process_group()
    sees = peers is not None and int(peers.reads[rank].sum()) == plan.old.num_ranks - 1
    pipe.send("loaded")
    if not plan.live[rank]:
        pipe.recv()  # the parent kills this process here
        return
    pipe.recv()
    live = plan.live_ranks
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("survivors", store),
        rank=live.index(rank),
        world_size=len(live),
        timeout=timedelta(seconds=120),
    )
    connect = torch.zeros(1)
    for peer in range(len(live)):  # as in a server that has run for a while
        dist.broadcast(connect, peer)
    pipe.send("connected")
    pipe.recv()
    plan.chunks(
        staging_bytes
    )  # loads the compiled kernels, as a server has while its model loads: seconds in a fresh process
    reports = []
    # Kept from one exchange to the next.
    kept = torch.full((staging_bytes,), 1, dtype=torch.uint8)
    memory = Memory(staging_bytes, kept=kept)

    def exchange() -> None:
        checkpoint = Checkpoint(folder) if len(plan.reads) else None
        reader = (
            CheckpointReader(checkpoint, hugging_face_experts(checkpoint)) if checkpoint else None
        )
        made = Exchange(plan, own, Communication(1, store=store), memory, reader, peers=peers)
        reports.append(made.run())

    seconds = {
        "exchange": _timed(exchange)
    }  # no file stays open: what is mapped stays in the page cache
    equal = True
    for kind, reload in (("reload all", reload_all), ("reload own", reload_own)):
        fresh = _empty(sizes, plan.new.slots_per_rank[rank])
        pipe.send(kind)
        pipe.recv()
        seconds[kind] = _timed(partial(reload, folder, plan.new, rank, fresh))
        equal &= all(
            torch.equal(a.view(torch.int16), b.view(torch.int16))
            for x, y in zip(weights, fresh)
            for a, b in zip(x, y)
        )
        del fresh
    raw = _ring(len(live), live.index(rank), reports[0].bytes_received)
    report = reports[0]
    found = {"longest": report.longest, "staging": report.staging_bytes, "chunks": report.chunks}
    pipe.send({"seconds": seconds, "raw": raw, "equal": equal, "sees": sees, **found})
    pipe.recv()


def _ring(size: int, rank: int, amount: int) -> float:
    """Seconds that plain copies take: as many bytes as the busiest rank received, from the left neighbour and to the right one."""
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
