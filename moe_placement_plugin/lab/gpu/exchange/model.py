"""Hold a made-up model's experts on one rank, and move them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ....exchange.plan import ExchangePlan
from ....rebalancing.exchanger import Exchanger, RankFacts, connect
from ....rebalancing.tables import warm_up
from ....verification.verify import Pass

logger = logging.getLogger("exchange_gpu")


@dataclass(frozen=True)
class Shape:
    """Describe the layers of a made-up model.

    Attributes:
        layers: MoE layers.
        experts: logical experts per layer.
        redundant: redundant experts per layer.
        hidden: columns of gate and up, ``[2 * width, hidden]``, rows of down, ``[hidden, width]``.
        width: intermediate size of an expert.
        dtype: of the weights.
    """

    layers: int
    experts: int
    redundant: int
    hidden: int
    width: int
    dtype: torch.dtype


SHAPES = {
    "5-layer": Shape(5, 64, 8, 2048, 1408, torch.bfloat16),
    "v2-lite": Shape(26, 64, 8, 2048, 1408, torch.bfloat16),
    # A byte per parameter, as FP8, which NCCL knows as bytes only.
    "r1": Shape(4, 64, 8, 7168, 2048, torch.uint8),
    "tiny": Shape(3, 8, 4, 32, 16, torch.bfloat16),
}


class MovedModel:
    """Hold one rank's experts, where all ranks' lie, and what moves them.

    Args:
        shape: of the model.

    Attributes:
        rank: this rank.
        ranks: EP ranks.
        device: of the weights.
        cpu_group: all ranks over gloo.
        group: all ranks over NCCL, or gloo without GPUs.
        slots: physical experts of a rank.
        first: where experts lie first, ``[layers, physical experts]``.
        table: where they lie now.
        weights: gate and up, and down, of each layer, ``[slots, ...]``.
        exchanger: what moves them.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
            torch.cuda.set_device(self.device)
        self.cpu_group = dist.new_group(backend="gloo")
        self.group = dist.group.WORLD
        physical = shape.experts + shape.redundant
        self.slots, rest = divmod(physical, self.ranks)
        if rest:
            raise SystemExit(
                f"{physical} slots do not divide over {self.ranks} ranks: "
                "choose another --shape or number"
            )
        self.first = np.tile(np.arange(physical) % shape.experts, (shape.layers, 1))
        self.table = self.first
        self.weights = self._fill()
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
        self._of_expert = self._all_digests()

    def _fill(self) -> list[list[torch.Tensor]]:
        """Make weights that tell every expert of every layer from the others."""
        shape = self.shape
        generator = torch.Generator().manual_seed(0)
        shapes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
        base = [
            torch.randint(0, 120, s, dtype=torch.uint8, generator=generator).to(self.device)
            for s in shapes
        ]
        weights = []
        for layer in range(shape.layers):
            tensors = [
                torch.empty((self.slots, *s), dtype=shape.dtype, device=self.device) for s in shapes
            ]
            for slot, expert in enumerate(self.local(self.first)[layer].tolist()):
                for tensor, pattern in zip(tensors, base):
                    raw = tensor[slot].view(torch.uint8)
                    if raw.shape != pattern.shape:
                        pattern = pattern.repeat(1, raw.shape[1] // pattern.shape[1])
                    raw.copy_(pattern ^ (expert + 3 * layer))
            weights.append(tensors)
        return weights

    def _all_digests(self) -> list[np.ndarray]:
        """Gather the digests of every expert of every layer, ``[layers][experts, tensors]``."""
        mine = {layer: self.digests(layer)[: self.slots] for layer in range(self.shape.layers)}
        found: list = [None] * self.ranks
        dist.all_gather_object(found, mine, group=self.cpu_group)
        of_expert = [
            np.empty((self.shape.experts, 2), dtype=object) for _ in range(self.shape.layers)
        ]
        for rank, of_rank in enumerate(found):
            for layer, values in of_rank.items():
                for slot, value in enumerate(values):
                    of_expert[layer][self.first[layer, rank * self.slots + slot]] = list(value)
        return of_expert

    def local(self, table: np.ndarray) -> np.ndarray:
        """Return this rank's slots of a table ``[layers, physical experts]``."""
        return table[:, self.rank * self.slots : (self.rank + 1) * self.slots]

    def digests(self, layer: int) -> np.ndarray:
        """Return the digests of a layer's slots, uint64 ``[slots, tensors]``."""
        seen = Pass()
        w13, w2 = self.weights[layer]
        seen.add(layer, self.local(self.table)[layer], {"w13": w13, "w2": w2})
        return np.asarray(seen.layers[layer].values).reshape(self.slots, -1)

    def verify(self, layers: Iterable[int]) -> None:
        """Check that every slot of these layers holds its expert.

        Raises:
            SystemExit: when one does not: no figure of this run is worth anything then.
        """
        for layer in layers:
            held = zip(self.local(self.table)[layer].tolist(), self.digests(layer))
            for slot, (expert, value) in enumerate(held):
                if list(value) != list(self._of_expert[layer][expert]):
                    raise SystemExit(
                        f"rank {self.rank}, layer {layer}, slot {slot} "
                        f"does not hold expert {expert}"
                    )

    def settle(self) -> None:
        """Wait until nothing is under way on any rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.cpu_group)

    def timed(self, call: Callable[[], object]) -> float:
        """Return the seconds of the slowest rank, all beginning together."""
        self.settle()
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=self.cpu_group)
        return float(taken)

    def move(self, table: np.ndarray, weighed: ExchangePlan | None = None) -> None:
        """Exchange to another table.

        Args:
            table: int ``[layers, physical experts]``.
            weighed: the exchange that it was decided by, if any.
        """
        if not np.array_equal(self.table, table):
            ours, layers = self.exchanger, range(self.shape.layers)
            ours.exchange(ours.plan(self.table, table, layers, weighed=weighed))
            self.table = table
