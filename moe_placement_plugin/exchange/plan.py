"""What has to move to get from one placement to another, on which ranks, in which order: a pure function.

Every slot of the new placement that does not hold its expert yet is filled in one of three ways: copied from another slot of its rank,
received from a live rank that holds the expert, or, only where no live rank holds it, read from the checkpoint. All ranks compute the same
plan from the same arguments and never talk about it.

Slots are local to their rank throughout: the executors index each rank's own weight tensors with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..core.diff import check_comparable
from ..core.errors import PlacementError
from ..core.placement import EngineTable, Placement
from ..core.topology import Topology

SCRATCH = -1
"""Slot number of the scratch row in `ExchangePlan.copies`."""


@dataclass
class CommitMetadata:
    """Which layers are on their new map: what it takes to serve after an interrupted exchange, and to undo one.

    Attributes:
        old, new: the maps before and after.
        committed: bool ``[layers]``, True for layers that are on the new map.
    """

    old: Placement
    new: Placement
    committed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self) -> None:
        if not self.committed.size:  # none was given
            self.committed = np.zeros(self.new.num_layers, dtype=bool)

    @property
    def complete(self) -> bool:
        """Whether every layer is on the new map."""
        return bool(self.committed.all())

    def row_in_force(self, row: int) -> np.ndarray:
        """int32 ``[slots]``: the map of one layer, old or new."""
        return (self.new if self.committed[row] else self.old).physical_to_logical[row]

    def in_force(self) -> Placement:
        """The placement in force, each layer old or new.

        Raises:
            PlacementError: when layers differ in slots, so that no one placement holds them.
        """
        if self.complete or not self.committed.any():
            return self.new if self.complete else self.old
        if self.old.slots_per_rank != self.new.slots_per_rank:
            raise PlacementError(
                f"{int(self.committed.sum())} of {self.committed.size} layers are on {self.new.num_slots} slots, the others on "
                f"{self.old.num_slots}: one placement cannot hold both; take the maps layer by layer (row_in_force)"
            )
        table = np.where(
            self.committed[:, None], self.new.physical_to_logical, self.old.physical_to_logical
        )
        kind = EngineTable if EngineTable in (type(self.old), type(self.new)) else Placement
        return kind(
            table,
            self.new.num_logical_experts,
            self.new.slots_per_rank,
            self.new.layer_ids,
            self.new.strategy,
        )

    def undo(
        self,
        topology: Topology | None = None,
        live_ranks: Sequence[int] | None = None,
        expert_bytes: int | Sequence[int] = 1,
    ) -> ExchangePlan:
        """The exchange that brings every layer back to its old map.

        Raises:
            PlacementError: as `in_force` and `plan_exchange` do.
        """
        return plan_exchange(self.in_force(), self.old, topology, live_ranks, expert_bytes)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Layers that are staged, agreed on and committed together.

    Attributes:
        rows: rows of the layers.
        transfers: int32 ``[n, 6]``, as `ExchangePlan.transfers`, in the order of their rounds.
        round_of: int32 ``[n]``, ascending: in a round every rank sends to at most one rank and receives from at most one.
        reads, copies: as `ExchangePlan.reads` and `.copies`.
        staging_bytes: int64 ``[ranks]``, staging memory that the chunk needs on each rank.
    """

    rows: tuple[int, ...]
    transfers: np.ndarray
    round_of: np.ndarray
    reads: np.ndarray
    copies: np.ndarray
    staging_bytes: np.ndarray

    @property
    def num_rounds(self) -> int:
        """Rounds of the chunk over all ranks."""
        return int(self.round_of[-1]) + 1 if self.round_of.size else 0


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """The moves between two placements of one model on the same ranks.

    Attributes:
        old, new: the placements.
        topology: the ranks' nodes.
        live: bool ``[ranks]``; the slots of the others are ignored on both sides.
        expert_bytes: int64 ``[layers]``, bytes of one expert with all its parameters.
        transfers: int32 ``[n, 6]``: row, expert, from rank, from slot, to rank, to slot.
        reads: int32 ``[n, 4]``: row, expert, rank, slot; from the checkpoint.
        copies: int32 ``[n, 4]``: row, rank, from slot, to slot (`SCRATCH` is the scratch row); done in this order, before
            what was staged is put into its slots, they read every slot before it is overwritten.
    """

    old: Placement
    new: Placement
    topology: Topology
    live: np.ndarray
    expert_bytes: np.ndarray
    transfers: np.ndarray
    reads: np.ndarray
    copies: np.ndarray

    @property
    def live_ranks(self) -> tuple[int, ...]:
        """EP ranks that take part."""
        return tuple(np.flatnonzero(self.live).tolist())

    @cached_property
    def changed_rows(self) -> np.ndarray:
        """int64 rows of the layers whose map changes (if only in slots of dead ranks: nothing moves then)."""
        if self.old.slots_per_rank != self.new.slots_per_rank:
            return np.arange(self.new.num_layers)
        return np.flatnonzero(
            (self.old.physical_to_logical != self.new.physical_to_logical).any(axis=1)
            | self._touched
        )

    @cached_property
    def _touched(self) -> np.ndarray:
        touched = np.zeros(self.new.num_layers, dtype=bool)
        for work in (self.transfers, self.reads, self.copies):
            touched[work[:, 0]] = True
        return touched

    @cached_property
    def incoming(self) -> np.ndarray:
        """int64 ``[layers, ranks]``: experts that a rank receives or reads."""
        shape = (self.new.num_layers, self.new.num_ranks)
        flat = np.concatenate(
            [
                self.transfers[:, 0].astype(np.int64) * shape[1] + self.transfers[:, 4],
                self.reads[:, 0].astype(np.int64) * shape[1] + self.reads[:, 2],
            ]
        )
        return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)

    @cached_property
    def needs_scratch(self) -> np.ndarray:
        """bool ``[layers, ranks]``: whether local copies form a cycle that only a scratch row opens."""
        result = np.zeros((self.new.num_layers, self.new.num_ranks), dtype=bool)
        opened = self.copies[self.copies[:, 3] == SCRATCH]
        result[opened[:, 0], opened[:, 1]] = True
        return result

    @property
    def bytes_moved(self) -> int:
        """Bytes that cross between ranks."""
        return int(self.expert_bytes[self.transfers[:, 0]].sum())

    @property
    def bytes_between_nodes(self) -> int:
        """The part of `bytes_moved` that crosses between nodes."""
        node_of = np.array(self.topology.node_of_rank)
        crossing = node_of[self.transfers[:, 2]] != node_of[self.transfers[:, 4]]
        return int(self.expert_bytes[self.transfers[crossing, 0]].sum())

    @property
    def bytes_read(self) -> int:
        """Bytes that come from the checkpoint, a replica on each of several ranks counted for each."""
        return int(self.expert_bytes[self.reads[:, 0]].sum())

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all that the plan follows from: ranks whose digests agree carry out the same plan."""
        facts = [
            self.old.digest,
            self.new.digest,
            self.live.tolist(),
            self.topology.node_of_rank,
            self.expert_bytes.tolist(),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def staging_needed(self, expert_bytes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Staging bytes, int64 ``[layers, ranks]``, that each layer needs by itself: its incoming experts, and a scratch expert for cycles.

        Args:
            expert_bytes: ``[layers]`` when an executor pads experts; the plan's own when left out.
        """
        size = (
            self.expert_bytes if expert_bytes is None else np.asarray(expert_bytes, dtype=np.int64)
        )
        return (self.incoming + self.needs_scratch) * size[:, None]

    @property
    def min_staging_bytes(self) -> int:
        """The least bound that `chunks` takes: what the neediest rank needs for the neediest layer."""
        return int(self.staging_needed().max(initial=0))

    def chunks(
        self,
        staging_bytes: int | None = None,
        max_layers: int | None = None,
        expert_bytes: Sequence[int] | None = None,
    ) -> tuple[Chunk, ...]:
        """Cut into runs of layers that fit the staging memory.

        A layer is never cut: it is committed as a whole or not at all, so what it receives must fit at once. The end state does not
        depend on the cut.

        Args:
            staging_bytes: bound on each rank's staging memory; None for one chunk.
            max_layers: most layers of a chunk; None for no limit.
            expert_bytes: ``[layers]`` when an executor pads experts.

        Raises:
            PlacementError: when a layer by itself does not fit, or a limit is not positive.
        """
        for name, value in (("staging_bytes", staging_bytes), ("max_layers", max_layers)):
            if value is not None and value < 1:
                raise PlacementError(f"{name} {value}: give 1 or more, or None for no limit")
        size = (
            self.expert_bytes if expert_bytes is None else np.asarray(expert_bytes, dtype=np.int64)
        )
        needed = self.staging_needed(size)
        if staging_bytes is not None and needed.max(initial=0) > staging_bytes:
            row, rank = np.unravel_index(int(needed.argmax()), needed.shape)
            raise PlacementError(
                f"staging_bytes {staging_bytes}: rank {rank} needs {int(needed[row, rank])} bytes to take in layer "
                f"{self.new.layer_ids[row]} ({int(self.incoming[row, rank])} experts); a layer is committed whole: "
                "give that many, or plan with fewer moves (max_moves)"
            )
        return tuple(self._cut(size, staging_bytes, max_layers))

    def _cut(
        self, size: np.ndarray, staging_bytes: int | None, max_layers: int | None
    ) -> Iterator[Chunk]:
        rows: list[int] = []
        incoming = np.zeros(self.new.num_ranks, dtype=np.int64)
        scratch = np.zeros_like(incoming)
        for row in self.changed_rows.tolist():
            more = incoming + self.incoming[row] * size[row]
            opened = np.maximum(scratch, self.needs_scratch[row] * size[row])
            if rows and (
                (max_layers is not None and len(rows) == max_layers)
                or (staging_bytes is not None and (more + opened).max() > staging_bytes)
            ):
                yield self._chunk(rows, incoming + scratch)
                rows = []
                more, opened = self.incoming[row] * size[row], self.needs_scratch[row] * size[row]
            rows.append(row)
            incoming, scratch = more, opened
        if rows:
            yield self._chunk(rows, incoming + scratch)

    def _chunk(self, rows: list[int], staging: np.ndarray) -> Chunk:
        from .plan_kernels import color  # lazy: numba

        def of_rows(
            work: np.ndarray,
        ) -> (
            np.ndarray
        ):  # all work is in ascending order of rows, and chunks are runs of changed rows
            return work[
                np.searchsorted(work[:, 0], rows[0]) : np.searchsorted(
                    work[:, 0], rows[-1], side="right"
                )
            ]

        transfers = of_rows(self.transfers)
        rounds = color(
            transfers[:, 2].astype(np.int64), transfers[:, 4].astype(np.int64), self.new.num_ranks
        )
        order = np.argsort(rounds, kind="stable")
        return Chunk(
            tuple(rows),
            transfers[order],
            rounds[order],
            of_rows(self.reads),
            of_rows(self.copies),
            staging,
        )

    def metadata(self) -> CommitMetadata:
        """Bookkeeping for carrying the plan out: no layer committed yet, except those that do not change."""
        committed = np.ones(self.new.num_layers, dtype=bool)
        committed[self.changed_rows] = False
        return CommitMetadata(self.old, self.new, committed)

    def __str__(self) -> str:
        parts = [f"{len(self.changed_rows)} of {self.new.num_layers} layers change"]
        parts.append(
            f"{len(self.transfers)} experts ({self.bytes_moved / 1e6:.1f} MB) between ranks"
        )
        if self.topology.num_nodes > 1:
            parts.append(f"{self.bytes_between_nodes / 1e6:.1f} MB of it between nodes")
        parts.append(f"{len(self.copies)} copies within ranks")
        parts.append(
            f"{len(self.reads)} experts ({self.bytes_read / 1e6:.1f} MB) from the checkpoint"
        )
        dead = np.flatnonzero(~self.live).tolist()
        return ", ".join(parts) + (f"; dead ranks {dead}" if dead else "")


def plan_exchange(
    old: Placement,
    new: Placement,
    topology: Topology | None = None,
    live_ranks: Sequence[int] | None = None,
    expert_bytes: int | Sequence[int] | np.ndarray = 1,
) -> ExchangePlan:
    """The moves that turn ``old`` into ``new`` in place.

    Args:
        old: the placement in force.
        new: the placement to go to; its ranks may have other numbers of slots, slot i of a rank being the same memory in both.
        topology: nodes of the ranks; one node when left out.
        live_ranks: ranks that take part; all when left out. What dead ranks held counts as lost, what they shall hold is ignored.
        expert_bytes: bytes of one expert, of all layers or one number per layer.

    Raises:
        PlacementError: when the placements are of different models or ranks, or the live ranks have no slot for an expert.
    """
    from .plan_kernels import route  # lazy: numba

    check_comparable(old, new)
    ranks = new.num_ranks
    topology = Topology(ranks) if topology is None else topology
    if topology.num_ranks != ranks:
        raise PlacementError(
            f"a topology of {topology.num_ranks} EP ranks for placements on {ranks}: give the group's own"
        )
    live = np.ones(ranks, dtype=bool)
    if live_ranks is not None:
        alive = [int(r) for r in live_ranks]
        wrong = [r for r in alive if not 0 <= r < ranks]
        if wrong or not alive:
            raise PlacementError(f"live_ranks {alive}: give at least one, each in 0..{ranks - 1}")
        live[:] = False
        live[alive] = True
    size = (
        np.full(new.num_layers, expert_bytes, dtype=np.int64)
        if np.ndim(expert_bytes) == 0
        else np.asarray(expert_bytes, np.int64)
    )
    if size.shape != (new.num_layers,) or (size < 0).any():
        raise PlacementError(
            f"expert_bytes {expert_bytes}: give one number >= 0, or one for each of the {new.num_layers} layers"
        )
    _check_served(new, live)
    layers, slots = new.physical_to_logical.shape
    transfers = np.empty((layers * slots, 6), np.int32)
    reads = np.empty((layers * slots, 4), np.int32)
    copies = np.empty((2 * layers * slots, 4), np.int32)
    n, m, k = route(
        old.physical_to_logical, new.physical_to_logical, old.rank_offsets, new.rank_offsets, new.num_logical_experts, live,
        np.array(topology.node_of_rank, dtype=np.int64), transfers, reads, copies,
    )  # fmt: skip
    return ExchangePlan(
        old, new, topology, live, size, transfers[:n].copy(), reads[:m].copy(), copies[:k].copy()
    )


def _check_served(new: Placement, live: np.ndarray) -> None:
    """Refuse a placement that leaves an expert without a live slot."""
    if live.all():
        return
    served = np.zeros((new.num_layers, new.num_logical_experts), dtype=bool)
    slots = np.flatnonzero(live[new.rank_of_slot])
    np.put_along_axis(served, new.physical_to_logical[:, slots].astype(np.int64), True, axis=1)
    missing = np.argwhere(~served)
    if missing.size:
        row, expert = (int(i) for i in missing[0])
        raise PlacementError(
            f"layer {new.layer_ids[row]}: the new placement has expert {expert} only on dead ranks {np.flatnonzero(~live).tolist()}: "
            "give it a slot on a live rank"
        )
