"""Which logical expert lies in which physical slot, per layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .errors import PlacementError


def even_slots(num_slots: int, num_ranks: int) -> tuple[int, ...]:
    """``num_slots`` dealt to ``num_ranks`` ranks, sizes differing by at most one, larger first."""
    base, extra = divmod(num_slots, num_ranks)
    return tuple(base + (r < extra) for r in range(num_ranks))


@dataclass(frozen=True, eq=False)
class Placement:
    """The logical expert that every physical slot of every MoE layer holds.

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
        draft: where the experts of the draft of speculative decoding lie, which numbers its MoE layers by itself.

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
        on_rank = self._count_on_rank()
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

    def _count_on_rank(self) -> np.ndarray:
        layers, slots = self.physical_to_logical.shape
        ranks, experts = self.num_ranks, self.num_logical_experts
        flat = self.rank_of_slot.astype(np.int64)[None, :] * experts + self.physical_to_logical
        flat += np.arange(layers, dtype=np.int64)[:, None] * (ranks * experts)
        return np.bincount(flat.ravel(), minlength=layers * ranks * experts).reshape(
            layers, ranks, experts
        )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """Physical experts per layer."""
        return self.physical_to_logical.shape[1]

    @property
    def num_ranks(self) -> int:
        """Number of EP ranks."""
        return len(self.slots_per_rank)

    @property
    def num_redundant(self) -> int:
        """Physical experts beyond one per logical expert, per layer."""
        return self.num_slots - self.num_logical_experts

    @property
    def is_even(self) -> bool:
        """Whether every rank has the same number of slots."""
        return len(set(self.slots_per_rank)) == 1

    @cached_property
    def rank_offsets(self) -> np.ndarray:
        """int64 ``[ranks + 1]``: rank r owns the slots ``rank_offsets[r]:rank_offsets[r + 1]``."""
        return np.concatenate(([0], np.cumsum(self.slots_per_rank))).astype(np.int64)

    @cached_property
    def rank_of_slot(self) -> np.ndarray:
        """int32 ``[slots]``: the EP rank of each slot."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int32), self.slots_per_rank)

    @cached_property
    def replica_counts(self) -> np.ndarray:
        """int32 ``[layers, experts]``: number of slots that hold each logical expert."""
        return self._count_on_rank().sum(axis=1).astype(np.int32)

    @cached_property
    def logical_to_physical(self) -> np.ndarray:
        """int32 ``[layers, experts, most replicas]``: slots of each expert in ascending order, -1 as padding."""
        layers, slots = self.physical_to_logical.shape
        counts = self.replica_counts
        order = np.argsort(self.physical_to_logical, axis=1, kind="stable")
        experts = np.take_along_axis(self.physical_to_logical, order, axis=1)
        starts = np.cumsum(counts, axis=1) - counts
        position = np.arange(slots)[None, :] - np.take_along_axis(starts, experts, axis=1)
        result = np.full((layers, self.num_logical_experts, int(counts.max())), -1, dtype=np.int32)
        result[np.arange(layers)[:, None], experts, position] = order
        return result

    def row(self, layer_id: int) -> int:
        """The row of the model's layer ``layer_id``.

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
        """int32 ``[slots of the rank]``: logical expert of each local slot of ``rank`` in row ``row``."""
        return self.physical_to_logical[row, self.rank_offsets[rank] : self.rank_offsets[rank + 1]]

    def expert_map(self, row: int, rank: int) -> np.ndarray:
        """int32 ``[experts]``: local slot of each logical expert on ``rank``, -1 where it lies elsewhere.

        This is vLLM's ``expert_map`` when there are no redundant experts.
        """
        result = np.full(self.num_logical_experts, -1, dtype=np.int32)
        local = self.local_experts(row, rank)
        result[local] = np.arange(local.size, dtype=np.int32)
        return result

    def rank_load(self, counts: np.ndarray) -> np.ndarray:
        """Tokens that reach each rank when the replicas of an expert share its tokens evenly.

        Args:
            counts: tokens per logical expert, ``[..., layers, experts]``.

        Returns:
            float64 ``[..., layers, ranks]``.
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
        # reduceat gives an empty range the value at its start: ranks without slots are put in afterwards.
        result = np.zeros(counts.shape[:-1] + (self.num_ranks,))
        used = np.flatnonzero(self.slots_per_rank)
        result[..., used] = np.add.reduceat(per_slot, self.rank_offsets[:-1][used], axis=-1)
        return result

    def balancedness(self, counts: np.ndarray) -> np.ndarray:
        """Mean rank load / greatest rank load, 1.0 being perfect; a layer without tokens counts as 1.0.

        Args:
            counts: tokens per logical expert, ``[..., layers, experts]``.

        Returns:
            float64 ``[..., layers]``.
        """
        load = self.rank_load(counts)
        most = load.max(axis=-1)
        return np.divide(load.mean(axis=-1), most, out=np.ones_like(most), where=most > 0)

    def overall_balancedness(self, counts: np.ndarray) -> float:
        """Sum over layers (and windows) of the mean rank loads / sum of the greatest, 1.0 being perfect."""
        load = self.rank_load(counts)
        most = float(load.max(axis=-1).sum())
        return float(load.mean(axis=-1).sum()) / most if most else 1.0

    def select_layers(self, layer_ids: Sequence[int]) -> Placement:
        """The placement of just the given layers, in the given order.

        Raises:
            PlacementError: if one of them is missing.
        """
        rows = [self.row(i) for i in layer_ids]
        return type(self)(
            self.physical_to_logical[rows],
            self.num_logical_experts,
            self.slots_per_rank,
            tuple(layer_ids),
            self.strategy,
            self.metadata,
            self.draft,
        )

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over everything that decides where an expert lies (not over name or metadata)."""
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
    """What an engine's own algorithm has put into force: a rank may hold an expert twice there, which a plan of ours never does."""

    _may_repeat: ClassVar[bool] = True


def as_int32_table(values: Any) -> np.ndarray:
    """Turn rows of expert ids, of a file or a caller, into int32 ``[layers, slots]``.

    Raises:
        PlacementError: when they are no such table.
    """
    try:
        table = np.asarray(values)
    except ValueError:
        raise PlacementError(
            "physical_to_logical has rows of different lengths: every layer needs the same slots"
        ) from None
    if table.ndim != 2 or 0 in table.shape:
        raise PlacementError(
            f"physical_to_logical has shape {table.shape}: it must be [layers, slots] with at "
            "least one of each"
        )
    if not np.issubdtype(table.dtype, np.integer):
        raise PlacementError(f"physical_to_logical has type {table.dtype}: expert ids are integers")
    if table.max() > np.iinfo(np.int32).max or table.min() < np.iinfo(np.int32).min:
        raise PlacementError(
            "physical_to_logical has ids beyond 32 bits: expert ids are small integers"
        )
    return np.array(table, dtype=np.int32)


def shorten(values: Iterable[Any], limit: int = 12) -> str:
    values = list(values)
    shown = ", ".join(str(v) for v in values[:limit])
    return f"[{shown}{', ...' if len(values) > limit else ''}]"
