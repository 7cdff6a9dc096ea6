"""Do a rank's part in a verification: gather, compare, remember, say how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from .compare import (
    ExpertDigests,
    LayerDigests,
    RankDigests,
    check_experts,
    check_replicas,
    expert_digests,
    find_identical_experts,
)
from .digests import layer_digests

RESTORE = (
    "The server stops: restart it, and if it happens again report the model, the quantisation and "
    "this message"
)
"""What to do about weights that changed while serving."""


@dataclass
class Pass:
    """Hold the digests of one rank's slots, and what they cost.

    Attributes:
        layers: layer id -> digests.
        num_bytes: weights that were read.
        seconds: wall time.
    """

    layers: RankDigests = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def num_slots(self) -> int:
        """Count the slots of this rank, all layers together."""
        return sum(len(layer.experts) for layer in self.layers.values())

    def add(self, layer_id: int, experts: np.ndarray, tensors: dict[str, Any]) -> None:
        """Digest one layer.

        Args:
            layer_id: its index in the model.
            experts: logical expert of each slot, int32 ``[slots]``; -1 for none.
            tensors: name -> torch tensor ``[slots, ...]``.
        """
        began = time.perf_counter()
        names, values = layer_digests(tensors)
        self.layers[layer_id] = LayerDigests(np.asarray(experts, dtype=np.int32), names, values)
        self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.seconds += time.perf_counter() - began


def gather(mine: Any, group: Any, size: int) -> list[Any]:
    """Gather what every rank has, in the ranks' order.

    Args:
        mine: picklable value of this rank.
        group: a torch.distributed group that carries CPU objects.
        size: ranks in it.
    """
    if size == 1:
        return [mine]
    import torch

    everyones: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyones, mine, group=group)
    return everyones


def digest_ranks(
    measure: Callable[[], Pass], group: Any, size: int
) -> tuple[Pass, list[RankDigests]]:
    """Digest this rank's slots and share the digests with all ranks.

    A rank that cannot digest its slots tells the others, so that all stop with its reason instead
    of waiting for it.

    Args:
        measure: digests this rank's slots.
        group: a torch.distributed group that carries CPU objects.
        size: ranks in it.

    Returns:
        (this rank's pass, digests of every EP rank in their order).

    Raises:
        PlacementError: on every rank alike, when one of them could not digest its slots.
    """
    try:
        mine, error = measure(), None
    except PlacementError as caught:
        mine, error = Pass(), str(caught)
    everyones = gather((mine.layers, error), group, size)
    for rank, (_, reason) in enumerate(everyones):
        if reason is not None:
            raise PlacementError(f"EP rank {rank}: {reason}")
    return mine, [layers for layers, _ in everyones]


def verify(
    mine: Pass,
    ranks: list[RankDigests],
    num_experts: int | Mapping[int, int],
    clean: ExpertDigests | None,
    logger: logging.Logger,
) -> ExpertDigests:
    """Check what was loaded, and say so in one line.

    Args:
        mine: this rank's pass.
        ranks: digests of every EP rank.
        num_experts: logical experts, of every layer or by layer id.
        clean: digests of a clean load; None checks replicas only.
        logger: the engine's.

    Returns:
        The digest of every expert, for later exchanges.

    Raises:
        WeightsMismatch: when weights are not where the placement says.
    """
    check_replicas(ranks, num_experts)
    if clean is not None:
        check_experts(
            clean,
            ranks,
            "the weights that were loaded are not those of the checkpoint",
            "The placement or a loader is at fault: leave the placement flag out, and report the "
            "model and this message",
        )
    experts = expert_digests(ranks)
    for sentence in find_identical_experts(experts):
        logger.warning(
            "moe_placement_plugin: %s; right for an upcycled model, else the checkpoint was read "
            "wrongly",
            sentence,
        )
    logger.info(
        "moe_placement_plugin: verified %d slots in %d layers of this rank (%s), %.2f GB in %.3f "
        "s (%.1f GB/s)",
        mine.num_slots,
        len(mine.layers),
        "replicas" if clean is None else "replicas and checkpoint",
        mine.num_bytes / 1e9,
        mine.seconds,
        mine.num_bytes / 1e9 / max(mine.seconds, 1e-9),
    )
    return experts
