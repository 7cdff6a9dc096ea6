"""Hold which logical expert lies in which physical slot, layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .errors import PlacementError
from .tables import as_int32_table, inverse_maps, shorten


def even_slots(num_slots: int, num_ranks: int) -> tuple[int, ...]:
    """Deal ``num_slots`` to ``num_ranks`` ranks: sizes differ by at most one, larger ones first."""
    base, extra = divmod(num_slots, num_ranks)
    return tuple(base + (r < extra) for r in range(num_ranks))


@dataclass(frozen=True, eq=False)
class Placement:
    """Name the logical expert that every physical slot of every MoE layer holds.

    Slots are numbered globally: rank 0 owns the first ``slots_per_rank[0]`` slots, and so on. An
    expert that lies in several slots of a layer is replicated ("redundant experts").

    Attributes:
        physical_to_logical: int32 ``[layers, slots]``, logical expert id of each slot.
        num_logical_experts: logical experts per layer.
        slots_per_rank: slots of each EP rank, the same in every layer, possibly uneven.
        layer_ids: index of each row's layer within the model, ``[layers]`` (a model may begin with
            dense layers); ``0..layers-1`` when left empty.
        strategy: name of the strategy that made it.
        metadata: free-form facts about its making (model, source load, ...), JSON-compatible.
        draft: where the experts of the draft of speculative decoding lie, which numbers its MoE
            layers by itself.

    Raises:
        PlacementError: when the maps do not form a valid placement.
    """

    physical_to_logical: np.ndarray
    num_logical_experts: int
    slots_per_rank: tuple[int, ...]
    layer_ids: tuple[int, ...] = ()
    strategy: str = "custom"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    draft: Placement | None = None
    _may_repeat: ClassVar[bool] = False

    def __post_init__(self) -> None:
        table = as_int32_table(self.physical_to_logical)
        table.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", table)
        object.__setattr__(self, "num_logical_experts", int(self.num_logical_experts))
        object.__setattr__(self, "slots_per_rank", tuple(int(s) for s in self.slots_per_rank))
        ids = tuple(int(i) for i in self.layer_ids) or tuple(range(table.shape[0]))
        object.__setattr__(self, "layer_ids", ids)
        self._validate()

    def _validate(self) -> None:
        layers, slots = self.physical_to_logical.shape
        experts = self.num_logical_experts
        if (
            len(self.layer_ids) != layers
            or len(set(self.layer_ids)) != layers
            or min(self.layer_ids) < 0
        ):
            raise PlacementError(
                f"layer_ids {shorten(self.layer_ids)} for {layers} layers: give one distinct id "
                ">= 0 per layer"
            )
        if not self.slots_per_rank or min(self.slots_per_rank) < 0:
            raise PlacementError(
                f"slots_per_rank {shorten(self.slots_per_rank)}: give at least one rank, none "
                "with fewer than 0 slots"
            )
        if sum(self.slots_per_rank) != slots:
            raise PlacementError(
                f"slots_per_rank {shorten(self.slots_per_rank)} adds up to "
                f"{sum(self.slots_per_rank)}, but a layer has {slots} slots: the two must agree"
            )
        table = self.physical_to_logical
        outside = np.argwhere((table < 0) | (table >= experts))
        if outside.size:
            layer, slot = (int(i) for i in outside[0])
            raise PlacementError(
                f"layer {self.layer_ids[layer]}, slot {slot} holds expert "
                f"{int(table[layer, slot])}: expert ids of this plan must lie in "
                f"0..{experts - 1}; correct the id or num_logical_experts"
            )
        on_rank = self.count_on_rank()
        missing = np.argwhere(on_rank.sum(axis=1) == 0)
        if missing.size:
            layer, expert = (int(i) for i in missing[0])
            raise PlacementError(
                f"layer {self.layer_ids[layer]} has no slot for expert {expert}: every logical "
                "expert must be present in every layer; give the expert a slot"
            )
        twice = np.argwhere(on_rank > 1)
        if twice.size and not self._may_repeat:
            layer, rank, expert = (int(i) for i in twice[0])
            raise PlacementError(
                f"layer {self.layer_ids[layer]} holds expert {expert} "
                f"{int(on_rank[layer, rank, expert])} times on rank {rank}: a second copy on the "
                "same rank is of no use; move it to another rank"
            )

    def count_on_rank(self) -> np.ndarray:
        """Count the copies of each expert on each rank, int64 ``[layers, ranks, experts]``."""
        layers, slots = self.physical_to_logical.shape
        ranks, experts = self.num_ranks, self.num_logical_experts
        flat = self.rank_of_slot.astype(np.int64)[None, :] * experts + self.physical_to_logical
        flat += np.arange(layers, dtype=np.int64)[:, None] * (ranks * experts)
        return np.bincount(flat.ravel(), minlength=layers * ranks * experts).reshape(
            layers, ranks, experts
        )

    @property
    def num_layers(self) -> int:
        """Count the MoE layers."""
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """Count the physical experts of a layer."""
        return self.physical_to_logical.shape[1]

    @property
    def num_ranks(self) -> int:
        """Count the EP ranks."""
        return len(self.slots_per_rank)

    @property
    def num_redundant(self) -> int:
        """Count the physical experts of a layer beyond one per logical expert."""
        return self.num_slots - self.num_logical_experts

    @property
    def is_even(self) -> bool:
        """Tell whether every rank has the same number of slots."""
        return len(set(self.slots_per_rank)) == 1

    @cached_property
    def rank_offsets(self) -> np.ndarray:
        """Give where each rank's slots begin, int64 ``[ranks + 1]``.

        Rank r owns the slots ``rank_offsets[r]:rank_offsets[r + 1]``.
        """
        return np.concatenate(([0], np.cumsum(self.slots_per_rank))).astype(np.int64)

    @cached_property
    def rank_of_slot(self) -> np.ndarray:
        """Give the EP rank of each slot, int32 ``[slots]``."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), self.slots_per_rank)

    @cached_property
    def replica_counts(self) -> np.ndarray:
        """Count the slots that hold each logical expert, int32 ``[layers, experts]``."""
        return self.count_on_rank().sum(axis=1).astype(np.int32)

    @cached_property
    def logical_to_physical(self) -> np.ndarray:
        """Give the slots of each expert, int32 ``[layers, experts, most replicas]``.

        They are in ascending order, with -1 as padding.
        """
        return inverse_maps(self.physical_to_logical, self.num_logical_experts)[0].astype(np.int32)

    def row(self, layer_id: int) -> int:
        """Find the row of the model's layer ``layer_id``.

        Raises:
            PlacementError: if the placement has no such layer.
        """
        try:
            return self.layer_ids.index(layer_id)
        except ValueError:
            raise PlacementError(
                f"the placement has no layer {layer_id} (it has {shorten(self.layer_ids)}): it "
                "was made for another model; plan again for this one"
            ) from None

    def local_experts(self, row: int, rank: int) -> np.ndarray:
        """Give the logical expert of each slot of ``rank`` in row ``row``, int32 ``[slots]``."""
        return self.physical_to_logical[row, self.rank_offsets[rank] : self.rank_offsets[rank + 1]]

    def expert_map(self, row: int, rank: int) -> np.ndarray:
        """Give the local slot of each logical expert on ``rank``, int32 ``[experts]``.

        An expert that lies elsewhere has -1. This is vLLM's ``expert_map`` when there are no
        redundant experts.
        """
        result = np.full(self.num_logical_experts, -1, dtype=np.int32)
        local = self.local_experts(row, rank)
        result[local] = np.arange(local.size, dtype=np.int32)
        return result

    def rank_load(self, counts: np.ndarray) -> np.ndarray:
        """Count the tokens of each rank when the replicas of an expert share its tokens evenly.

        Args:
            counts: tokens per logical expert, ``[..., layers, experts]``.

        Returns:
            float64 ``[..., layers, ranks]``.

        Raises:
            PlacementError: when the counts are of other layers or experts.
        """
        counts = np.asarray(counts, dtype=np.float64)
        if counts.shape[-2:] != (self.num_layers, self.num_logical_experts):
            raise PlacementError(
                f"counts of shape {counts.shape} for a placement of {self.num_layers} layers and "
                f"{self.num_logical_experts} experts: the last two axes must be [layers, experts]"
            )
        share = counts / self.replica_counts
        index = np.broadcast_to(
            self.physical_to_logical, counts.shape[:-2] + self.physical_to_logical.shape
        )
        per_slot = np.take_along_axis(share, index, axis=-1)
        # reduceat gives an empty range the value at its start: ranks without slots are put in
        # afterwards.
        result = np.zeros(counts.shape[:-1] + (self.num_ranks,))
        used = np.flatnonzero(self.slots_per_rank)
        result[..., used] = np.add.reduceat(per_slot, self.rank_offsets[:-1][used], axis=-1)
        return result

    def balancedness(self, counts: np.ndarray) -> np.ndarray:
        """Divide the mean rank load of each layer by its greatest, 1.0 being perfect.

        Args:
            counts: tokens per logical expert, ``[..., layers, experts]``.

        Returns:
            float64 ``[..., layers]``; 1.0 for a layer without tokens.
        """
        load = self.rank_load(counts)
        most = load.max(axis=-1)
        return np.divide(load.mean(axis=-1), most, out=np.ones_like(most), where=most > 0)

    def overall_balancedness(self, counts: np.ndarray) -> float:
        """Divide the mean rank loads, summed over layers and windows, by the sum of the greatest.

        Args:
            counts: tokens per logical expert, ``[..., layers, experts]``.

        Returns:
            at most 1.0, which is perfect, and which no tokens at all give too.
        """
        load = self.rank_load(counts)
        most = float(load.max(axis=-1).sum())
        return float(load.mean(axis=-1).sum()) / most if most else 1.0

    def select_layers(self, layer_ids: Sequence[int]) -> Placement:
        """Return the placement of just the given layers, in the given order.

        Raises:
            PlacementError: if one of them is missing.
        """
        rows = [self.row(i) for i in layer_ids]
        return replace(
            self, physical_to_logical=self.physical_to_logical[rows], layer_ids=tuple(layer_ids)
        )

    @cached_property
    def digest(self) -> str:
        """Give the hex SHA-256 of where experts lie, which name and metadata do not change."""
        h = hashlib.sha256()
        h.update(
            json.dumps([self.num_logical_experts, self.slots_per_rank, self.layer_ids]).encode()
        )
        h.update(np.ascontiguousarray(self.physical_to_logical, dtype="<i4").tobytes())
        if self.draft is not None:
            h.update(self.draft.digest.encode())
        return h.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class EngineTable(Placement):
    """Hold what an engine's own algorithm put into force: a rank may hold an expert twice there."""

    _may_repeat: ClassVar[bool] = True
