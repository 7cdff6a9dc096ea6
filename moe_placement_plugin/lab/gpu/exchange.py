"""Moving experts between GPUs: bandwidth against plain peer-to-peer copies, and the pause against vLLM's own sync EPLB.

    torchrun --nproc-per-node 2 -m moe_placement_plugin.lab.gpu.exchange [--shape SHAPE]

Shapes: ``5-layer``, 5 layers of 64 + 8 experts of 17.3 MB in bfloat16; ``v2-lite``, the same experts in the 26 layers of
DeepSeek-V2-Lite; ``r1``, 4 layers of 64 + 8 experts of 44 MB, one byte per parameter; ``tiny``, which shows on a machine
without a GPU that it runs.

What is printed, medians of ``--repeats``:

- plain copies: ``tensor.copy_`` from one GPU's memory to the next one's, all GPUs at the same time (the copy engines over NVLink), and NCCL's
  send and receive of the same bytes in one piece;
- exchange, all: nearly every slot changes rank. Its bandwidth is what the busiest rank receives by the time from the plan to the last slot filled;
  once with experts sent, once with experts read in the other GPU's memory, where that can be seen, slot by slot in order and, "scattered", into
  slots in any order, so that hardly any two experts lie one behind the other at both ends;
- pause, for a load that has drifted: from the summed load to serving again. Ours: planning, decision, exchange, verification of the layers that
  changed. vLLM's, where it is installed: its default policy and its `rearrange_expert_weights_inplace` over torch_gloo (its default) and over
  torch_nccl, which verifies nothing. Maps are not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ... import ExpertLoad
from ...exchange import peer_reads
from ...exchange.plan import ExchangePlan
from ...rebalancing.exchanger import Exchanger, RankFacts, connect
from ...rebalancing.policy import RebalancePolicy
from ...rebalancing.rebalancer import Rebalancer
from ...rebalancing.tables import EngineRanks, warm_up
from ...verification.verify import Pass
from ..bench.timing import device_facts

logger = logging.getLogger("exchange_gpu")


@dataclass(frozen=True)
class Shape:
    """Layers of a made-up model: gate and up ``[2 * width, hidden]`` and down ``[hidden, width]`` of each expert."""

    layers: int
    experts: int
    redundant: int
    hidden: int
    width: int
    dtype: torch.dtype


SHAPES = {
    "5-layer": Shape(5, 64, 8, 2048, 1408, torch.bfloat16),
    "v2-lite": Shape(26, 64, 8, 2048, 1408, torch.bfloat16),
    "r1": Shape(
        4, 64, 8, 7168, 2048, torch.uint8
    ),  # a byte per parameter, as FP8, which NCCL knows as bytes only
    "tiny": Shape(3, 8, 4, 32, 16, torch.bfloat16),
}


class Bench:
    """One rank.

    Args:
        shape: of the model.
        repeats: of each measurement.
    """

    def __init__(self, shape: Shape, repeats: int):
        self.shape, self.repeats = shape, repeats
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            if cuda
            else torch.device("cpu")
        )
        if cuda:
            torch.cuda.set_device(self.device)
        self.cpu_group = dist.new_group(backend="gloo")
        self.group = dist.group.WORLD
        slots, rest = divmod(shape.experts + shape.redundant, self.ranks)
        if rest:
            raise SystemExit(
                f"{shape.experts + shape.redundant} slots do not divide over {self.ranks} ranks: choose another --shape or number"
            )
        self.slots = slots
        self.first = np.tile(np.arange(slots * self.ranks) % shape.experts, (shape.layers, 1))
        generator = torch.Generator().manual_seed(0)
        shapes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
        base = [
            torch.randint(0, 120, s, dtype=torch.uint8, generator=generator).to(self.device)
            for s in shapes
        ]
        self.weights = []
        for layer in range(shape.layers):
            tensors = [
                torch.empty((slots, *s), dtype=shape.dtype, device=self.device) for s in shapes
            ]
            for slot, expert in enumerate(self.local(self.first)[layer].tolist()):
                for tensor, pattern in zip(tensors, base):
                    raw = tensor[slot].view(torch.uint8)
                    raw.copy_(
                        (
                            pattern
                            if raw.shape == pattern.shape
                            else pattern.repeat(1, raw.shape[1] // pattern.shape[1])
                        )
                        ^ (expert + 3 * layer)
                    )
            self.weights.append(tensors)
        self.table = self.first
        connect(self.group, self.device)
        self.exchanger = Exchanger(
            dict(enumerate(self.weights)),
            shape.experts,
            self.group,
            RankFacts.gather(self.cpu_group),
            "bench",
            logger,
        )
        self.exchanger.reserve()
        warm_up(self.first, shape.experts, self.ranks)
        self.expected = {layer: self.digests(layer)[: self.slots] for layer in range(shape.layers)}
        found: list = [None] * self.ranks
        dist.all_gather_object(found, self.expected, group=self.cpu_group)
        self.of_expert = [np.empty((shape.experts, 2), dtype=object) for _ in range(shape.layers)]
        for rank, of_rank in enumerate(found):
            for layer, values in of_rank.items():
                for slot, value in enumerate(values):
                    self.of_expert[layer][self.first[layer, rank * slots + slot]] = list(value)

    def local(self, table: np.ndarray) -> np.ndarray:
        """This rank's slots of a table ``[layers, physical experts]``."""
        return table[:, self.rank * self.slots : (self.rank + 1) * self.slots]

    def digests(self, layer: int) -> np.ndarray:
        """uint64 ``[slots, tensors]``."""
        seen = Pass()
        seen.add(
            layer,
            self.local(self.table)[layer],
            {"w13": self.weights[layer][0], "w2": self.weights[layer][1]},
        )
        return np.asarray(seen.layers[layer].values).reshape(self.slots, -1)

    def verify(self, layers) -> None:
        """Every slot of these layers holds its expert.

        Raises:
            SystemExit: when one does not: no figure of this run is worth anything then.
        """
        for layer in layers:
            for slot, (expert, value) in enumerate(
                zip(self.local(self.table)[layer].tolist(), self.digests(layer))
            ):
                if list(value) != list(self.of_expert[layer][expert]):
                    raise SystemExit(
                        f"rank {self.rank}, layer {layer}, slot {slot} does not hold expert {expert}"
                    )

    def settle(self) -> None:
        """Nothing is under way on any rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.cpu_group)

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of the slowest rank, all beginning together."""
        self.settle()
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self.cpu_group)
        return float(taken)

    def plain_copies(self, amount: int) -> dict[str, float]:
        """Bytes per second that each rank receives, in pieces of 256 MB."""
        piece = min(amount, 256 << 20)
        number = max(1, amount // piece)
        source = torch.ones(piece, dtype=torch.uint8, device=self.device)
        rates = {}
        if self.device.type == "cuda" and torch.cuda.device_count() >= self.ranks:
            target = torch.empty(
                piece,
                dtype=torch.uint8,
                device=torch.device("cuda", (self.device.index + 1) % self.ranks),
            )

            def copy() -> None:
                for _ in range(number):
                    target.copy_(source, non_blocking=True)
                torch.cuda.synchronize(target.device)

            copy()
            rates["peer copy"] = (
                number * piece / statistics.median(self.timed(copy) for _ in range(self.repeats))
            )
        into = torch.empty_like(source)

        def send() -> None:
            for _ in range(number):
                pair = [
                    dist.P2POp(dist.isend, source, (self.rank + 1) % self.ranks),
                    dist.P2POp(dist.irecv, into, (self.rank - 1) % self.ranks),
                ]
                for work in dist.batch_isend_irecv(pair):
                    work.wait()

        send()
        rates["send and receive"] = (
            number * piece / statistics.median(self.timed(send) for _ in range(self.repeats))
        )
        return rates

    def ways(self) -> Iterator[str]:
        """How experts come from another rank: ``sent``, then, where memory can be seen, ``read``; the last one is what engines get.

        GPUs are read by a kernel as well, for comparison (`peer_reads.READ_SINGLY`).
        """
        yield "sent"
        if not self.exchanger.look_at_peers(self.cpu_group).reads.any():
            return
        if self.device.type == "cuda":
            size, peer_reads.READ_SINGLY = peer_reads.READ_SINGLY, sys.maxsize
            yield "read by a kernel"
            peer_reads.READ_SINGLY = size
        yield "read"

    def move(self, table: np.ndarray, weighed: ExchangePlan | None = None) -> None:
        """Exchange to another table.

        Args:
            table: int ``[layers, physical experts]``.
            weighed: the exchange that it was decided by, if any.
        """
        if not np.array_equal(self.table, table):
            ours = self.exchanger
            ours.exchange(ours.plan(self.table, table, range(len(table)), weighed=weighed))
            self.table = table

    def everything(self, scattered: bool = False) -> dict[str, float]:
        """Nearly every slot changes rank, and back.

        Args:
            scattered: into slots in any order.
        """
        there = np.roll(self.first, self.slots, axis=1)
        if scattered:
            rng = np.random.default_rng(1)
            there = rng.permuted(there.reshape(-1, self.slots), axis=1).reshape(there.shape)
        moves = self.exchanger.plan(self.first, there, range(self.shape.layers))
        busiest = int((moves.incoming * moves.expert_bytes[:, None]).sum(axis=0).max())
        times, longest = [], []
        for turn in range(2 * self.repeats + 2):
            taken = self.timed(lambda goal=there if turn % 2 == 0 else self.first: self.move(goal))
            if turn >= 2:  # the first way there and back warms up
                times.append(taken)
                longest.append(self.exchanger.last.longest)
        self.verify(range(self.shape.layers))
        seconds = statistics.median(times)
        report = self.exchanger.last
        return {"bytes": busiest, "seconds": seconds, "bytes_per_s": busiest / seconds, "longest_chunk": statistics.median(longest),
                "chunks": report.chunks, "staging_bytes": report.staging_bytes}  # fmt: skip

    def windows(self) -> list[np.ndarray]:
        """Loads ``[layers, experts]`` that drift, alike on all ranks."""
        rng = np.random.default_rng(0)
        share = rng.lognormal(0, 1.0, (self.shape.layers, self.shape.experts))
        found = []
        for _ in range(self.repeats + 2):
            found.append(np.rint(1e5 * share).astype(np.int64) + 1)
            share = share * rng.lognormal(0, 0.6, share.shape)
        return found

    def pause_ours(self) -> dict[str, float]:
        """A rebalance with our planner and exchange after each window."""
        sizes = list(self.exchanger.expert_bytes.values())
        rebalancer = Rebalancer(
            RebalancePolicy(min_gain=0.0, hysteresis=0.0),
            range(self.shape.layers),
            sizes,
            logger,
            self.exchanger.topology,
        )
        times, parts, moved = [], [], []
        for load in self.windows():
            spent = {}

            def rebalance(load=load, spent=spent) -> None:
                began = time.perf_counter()
                proposal = rebalancer.propose(
                    ExpertLoad(load[None]), self.table, EngineRanks(self.ranks)
                )
                spent["plan"] = time.perf_counter() - began
                old = self.table
                self.move(np.asarray(proposal.table, dtype=np.int64), proposal.exchange)
                spent["bytes"] = proposal.decision.bytes
                spent["exchange"] = time.perf_counter() - began - spent["plan"]
                self.verify(np.flatnonzero((old != self.table).any(axis=1)).tolist())
                spent["verify"] = time.perf_counter() - began - spent["plan"] - spent["exchange"]

            times.append(self.timed(rebalance))
            parts.append(spent)
            moved.append(spent["bytes"])
        kept = slice(2, None)
        return {
            "seconds": statistics.median(times[kept]),
            "longest": max(times[kept]),
            "bytes": statistics.median(moved[kept]),
        } | {
            name: statistics.median(p[name] for p in parts[kept])
            for name in ("plan", "exchange", "verify")
        }

    def pause_vllm(self, kind: str) -> dict[str, float]:
        """The same windows with vLLM's default policy and its own exchange."""
        from vllm.distributed.eplb import eplb_communicator, rebalance_execute
        from vllm.distributed.eplb.policy import EPLB_POLICIES

        if kind == "torch_gloo":
            communicator = eplb_communicator.TorchDistGlooStagedEplbCommunicator(
                cpu_group=self.cpu_group
            )
        else:
            communicator = eplb_communicator.TorchDistNcclEplbCommunicator(ep_group=self.group)
        buffer = [torch.empty_like(w) for w in self.weights[0]]
        times, moved = [], []
        for load in self.windows():
            old = self.table

            def rebalance(load=load) -> None:
                table = EPLB_POLICIES["default"].rebalance_experts(
                    torch.from_numpy(load),
                    self.slots * self.ranks,
                    1,
                    1,
                    self.ranks,
                    torch.from_numpy(self.table),
                )
                rebalance_execute.rearrange_expert_weights_inplace(
                    torch.from_numpy(self.table),
                    table,
                    self.weights,
                    buffer,
                    self.group,
                    communicator,
                )
                self.table = table.numpy()

            times.append(self.timed(rebalance))
            arrived = [
                np.setdiff1d(b, a).size
                for a, b in zip(old.reshape(-1, self.slots), self.table.reshape(-1, self.slots))
            ]
            moved.append(sum(arrived) * self.exchanger.expert_bytes[0])
        self.verify(range(self.shape.layers))
        return {
            "seconds": statistics.median(times[2:]),
            "longest": max(times[2:]),
            "bytes": statistics.median(moved[2:]),
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="5-layer" if torch.cuda.is_available() else "tiny"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--ours",
        action="store_true",
        help="leave vLLM's exchange out, which takes a second and more each time over torch_gloo",
    )
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    shape = SHAPES[options.shape]
    bench = Bench(shape, options.repeats)
    result: dict = {
        "machine": device_facts(bench.device),
        "shape": options.shape,
        "ranks": bench.ranks,
    }
    result["all"], result["pause"] = {}, {}
    for way in bench.ways():
        bench.move(bench.first)
        result["all"][way] = bench.everything()
        result["all"][f"{way}, scattered"] = bench.everything(scattered=True)
        result["pause"][f"ours, {way}"] = ours = bench.pause_ours()
    result["plain"] = bench.plain_copies(result["all"][way]["bytes"])
    best = result["plain"].get("peer copy", result["plain"]["send and receive"])
    for figures in result["all"].values():
        figures["share of plain copies"] = figures["bytes_per_s"] / best
    try:
        rivals = (
            ("torch_gloo", "torch_nccl") if cuda else ("torch_nccl",)
        )  # the first waits for a GPU, the second sends over gloo too
        for kind in () if options.ours else rivals:
            bench.move(bench.first)
            result["pause"][f"vLLM, {kind}"] = bench.pause_vllm(kind)
    except ImportError as error:
        result["missing"] = f"vLLM: {error}"
    for name, figures in result["pause"].items():
        figures["of ours"] = figures["longest"] / ours["longest"]
        if name.startswith("vLLM"):
            import vllm

            result["vllm"] = vllm.__version__
    if bench.rank == 0:
        show(result)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(result, file, indent=1)
    dist.destroy_process_group()
    return 0


def show(result: dict) -> None:
    """Print the figures."""
    print(
        json.dumps(result["machine"]),
        f"shape {result['shape']}, {result['ranks']} ranks",
        *([result["missing"]] if "missing" in result else []),
    )
    for way, every in result["all"].items():
        print(
            f"exchange, all, {way}: {every['bytes'] / 1e6:.1f} MB into the busiest rank in {every['seconds'] * 1e3:.2f} ms = "
            f"{every['bytes_per_s'] / 1e9:.2f} GB/s, {every['chunks']} chunks of at most {every['longest_chunk'] * 1e3:.2f} ms, "
            f"{every['staging_bytes'] / 1e6:.1f} MB of staging memory; "
            + ", ".join(
                f"{every['bytes_per_s'] / rate:.0%} of {name}"
                for name, rate in result["plain"].items()
            )
        )
    for name, rate in result["plain"].items():
        print(f"plain copies, {name}: {rate / 1e9:.2f} GB/s")
    for name, figures in result["pause"].items():
        parts = ", ".join(
            f"{key} {figures[key] * 1e3:.2f}"
            for key in ("plan", "exchange", "verify")
            if key in figures
        )
        print(
            f"pause, {name}: {figures['seconds'] * 1e3:.2f} ms, longest {figures['longest'] * 1e3:.2f} ms ({figures['of ours']:.1f}x ours), "
            f"{figures['bytes'] / 1e6:.1f} MB moved{'; ' + parts if parts else ''}"
        )


if __name__ == "__main__":
    sys.exit(main())
