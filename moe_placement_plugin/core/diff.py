"""Tell what it takes to get from one placement to another: slots, bytes, time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import PlacementError
from .placement import Placement

_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp8": 1,
    "float8_e4m3fn": 1,
    "int8": 1,
    "int4": 0.5,
    "mxfp4": 0.5,
    "nvfp4": 0.5,
}


@dataclass(frozen=True)
class Moves:
    """Hold the differences of two placements of the same model and ranks.

    Attributes:
        changed_slots: slots that hold another expert than before, ``[layers]``.
        received: experts that a rank did not hold before, ``[layers, ranks]``; only these cross
            between ranks.
        slots: physical experts per layer.
        layer_ids: index of each layer within the model.
        replicas_changed: experts whose number of copies changes, ``[layers]``.
    """

    changed_slots: np.ndarray
    received: np.ndarray
    slots: int
    layer_ids: tuple[int, ...]
    replicas_changed: np.ndarray

    @property
    def total(self) -> int:
        """Count the experts that cross between ranks, over all layers."""
        return int(self.received.sum())

    @property
    def share(self) -> float:
        """Give `total` as a share of all slots."""
        return self.total / (self.slots * len(self.layer_ids))

    def bytes(self, expert_bytes: int) -> int:
        """Count the bytes that cross between ranks."""
        return self.total * expert_bytes

    def seconds(self, expert_bytes: int, bandwidth: float) -> float:
        """Estimate the least time of the exchange: that of the rank which receives most.

        Args:
            expert_bytes: bytes of one expert.
            bandwidth: bytes per second that a rank can receive.
        """
        return float(self.received.sum(axis=0).max()) * expert_bytes / bandwidth


def check_comparable(old: Placement, new: Placement) -> None:
    """Refuse placements between which nothing can move.

    Raises:
        PlacementError: when they are of different models, layers or ranks.
    """
    for what, before, after in (
        ("experts", old.num_logical_experts, new.num_logical_experts),
        ("EP ranks", old.num_ranks, new.num_ranks),
        ("layers", old.num_layers, new.num_layers),
    ):
        if before != after:
            raise PlacementError(
                f"the plans are for {before} and {after} {what}: only plans for one model and "
                "cluster can be compared"
            )
    if old.layer_ids != new.layer_ids:
        raise PlacementError(
            f"the plans are for layers {old.layer_ids[0]}..{old.layer_ids[-1]} and "
            f"{new.layer_ids[0]}..{new.layer_ids[-1]}: only plans for one model can be compared"
        )


def compare(old: Placement, new: Placement) -> Moves:
    """Find the moves from ``old`` to ``new``.

    Raises:
        PlacementError: when they are of different models, layers or ranks.
    """
    check_comparable(old, new)
    before, after = old.count_on_rank() > 0, new.count_on_rank() > 0
    received = (after & ~before).sum(axis=2)
    if old.slots_per_rank == new.slots_per_rank:
        changed = (old.physical_to_logical != new.physical_to_logical).sum(axis=1)
    else:
        changed = received.sum(axis=1)
    replicas = (old.replica_counts != new.replica_counts).sum(axis=1)
    return Moves(changed, received, new.num_slots, new.layer_ids, replicas)


def expert_bytes_of(config: Mapping[str, Any], source: str) -> int:
    """Compute the bytes of one expert: its gate, up and down projection.

    Args:
        config: Hugging Face config of the model.
        source: names the config in errors.

    Raises:
        PlacementError: when the config does not say.
    """
    text = config.get("text_config") or config
    hidden = text.get("hidden_size")
    width = (
        text.get("moe_intermediate_size")
        or text.get("expert_ffn_hidden_size")
        or text.get("intermediate_size")
    )
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    kind = (
        quantization.get("quant_method")
        or text.get("dtype")
        or text.get("torch_dtype")
        or config.get("torch_dtype")
    )
    if not hidden or not width or kind not in _BYTES:
        raise PlacementError(
            f"{source}: bytes of an expert cannot be told from hidden_size {hidden}, "
            f"moe_intermediate_size {width} and type {kind}: give them with --expert-bytes"
        )
    width = max(width) if isinstance(width, list) else width
    return int(3 * hidden * width * _BYTES[kind])


def as_json(moves: Moves, expert_bytes: int | None, bandwidth: float) -> str:
    """Write the comparison as JSON text.

    Args:
        moves: what `compare` found.
        expert_bytes: bytes of one expert; None leaves bytes and time out.
        bandwidth: bytes per second that a rank can receive.
    """
    data: dict[str, Any] = {
        "layer_ids": list(moves.layer_ids),
        "changed_slots": moves.changed_slots.tolist(),
        "received": moves.received.tolist(),
        "moves": moves.total,
        "share_of_slots": moves.share,
        "replicas_changed": moves.replicas_changed.tolist(),
    }
    if expert_bytes is not None:
        data |= {
            "expert_bytes": expert_bytes,
            "bytes": moves.bytes(expert_bytes),
            "bandwidth": bandwidth,
            "seconds": moves.seconds(expert_bytes, bandwidth),
        }
    return json.dumps(data)
