"""Plan what has to move between two placements, on which ranks, in which order: pure.

Every slot of the new placement that does not hold its expert yet is filled in one of three ways:
copied from another slot of its rank, received from a live rank that holds the expert, or, only
where no live rank holds it, read from the checkpoint. All ranks compute the same plan from the same
arguments and never talk about it.

Slots are local to their rank throughout: the executors index each rank's own weight tensors with
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..core.diff import check_comparable
from ..core.errors import PlacementError
from ..core.placement import Placement
from ..core.topology import Topology
from .chunks import Chunk, cut
from .commit_metadata import CommitMetadata
from .transfer_table import SCRATCH, CopyTable, ReadTable, TransferTable


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """Hold the moves between two placements of one model on the same ranks.

    Attributes:
        old, new: the placements.
        topology: the ranks' nodes.
        live: bool ``[ranks]``; the slots of the others are ignored on both sides.
        expert_bytes: int64 ``[layers]``, bytes of one expert with all its parameters.
        transfers: experts that cross between ranks.
        reads: experts that come from the checkpoint.
        copies: copies within ranks, from or to a slot or the scratch row (`SCRATCH`); done in this
            order, before what was staged is put into its slots, they read every slot before it is
            overwritten.
    """

    old: Placement
    new: Placement
    topology: Topology
    live: np.ndarray
    expert_bytes: np.ndarray
    transfers: TransferTable
    reads: ReadTable
    copies: CopyTable

    @property
    def live_ranks(self) -> tuple[int, ...]:
        """Return the EP ranks that take part."""
        return tuple(np.flatnonzero(self.live).tolist())

    @cached_property
    def changed_rows(self) -> np.ndarray:
        """Return the int64 rows of the layers whose map changes.

        Where it changes in slots of dead ranks only, nothing moves.
        """
        if self.old.slots_per_rank != self.new.slots_per_rank:
            return np.arange(self.new.num_layers)
        changed = (self.old.physical_to_logical != self.new.physical_to_logical).any(axis=1)
        for work in (self.transfers, self.reads, self.copies):
            changed[work.row] = True
        return np.flatnonzero(changed)

    @cached_property
    def incoming(self) -> np.ndarray:
        """Return how many experts each rank receives or reads, int64 ``[layers, ranks]``."""
        shape = (self.new.num_layers, self.new.num_ranks)
        flat = np.concatenate(
            [
                self.transfers.row.astype(np.int64) * shape[1] + self.transfers.to_rank,
                self.reads.row.astype(np.int64) * shape[1] + self.reads.rank,
            ]
        )
        return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)

    @cached_property
    def needs_scratch(self) -> np.ndarray:
        """Return where copies form a cycle that a scratch row opens, bool ``[layers, ranks]``."""
        result = np.zeros((self.new.num_layers, self.new.num_ranks), dtype=bool)
        opened = self.copies.where(self.copies.to_slot == SCRATCH)
        result[opened.row, opened.rank] = True
        return result

    @property
    def bytes_moved(self) -> int:
        """Return the bytes that cross between ranks."""
        return int(self.expert_bytes[self.transfers.row].sum())

    @property
    def bytes_between_nodes(self) -> int:
        """Return the part of `bytes_moved` that crosses between nodes."""
        node_of = np.array(self.topology.node_of_rank)
        crossing = node_of[self.transfers.from_rank] != node_of[self.transfers.to_rank]
        return int(self.expert_bytes[self.transfers.row[crossing]].sum())

    @property
    def bytes_read(self) -> int:
        """Return the bytes from the checkpoint; what several ranks read counts for each."""
        return int(self.expert_bytes[self.reads.row].sum())

    @cached_property
    def digest(self) -> str:
        """Return a hex SHA-256 of all moves, and of the placements that they lead between.

        Ranks whose digests agree carry out the same plan.
        """
        facts = [
            self.old.digest,
            self.new.digest,
            self.live.tolist(),
            self.topology.node_of_rank,
            self.expert_bytes.tolist(),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for work in (self.transfers, self.reads, self.copies):
            digest.update(work.array.tobytes())
        return digest.hexdigest()

    def staging_needed(self, expert_bytes: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return the staging bytes that each layer needs by itself, int64 ``[layers, ranks]``.

        They hold its incoming experts, and a scratch expert where there are cycles.

        Args:
            expert_bytes: ``[layers]`` when an executor pads experts; the plan's own when left out.
        """
        return (self.incoming + self.needs_scratch) * self._sizes(expert_bytes)[:, None]

    def _sizes(self, expert_bytes: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if expert_bytes is None:
            return self.expert_bytes
        return np.asarray(expert_bytes, dtype=np.int64)

    @property
    def min_staging_bytes(self) -> int:
        """Return the least bound that `chunks` takes: what the neediest layer needs."""
        return int(self.staging_needed().max(initial=0))

    def chunks(
        self,
        staging_bytes: int | None = None,
        max_layers: int | None = None,
        expert_bytes: Sequence[int] | None = None,
    ) -> tuple[Chunk, ...]:
        """Cut into runs of layers that fit the staging memory.

        A layer is never cut: it is committed as a whole or not at all, so what it receives must fit
        at once. The end state does not depend on the cut.

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
        needed = self.staging_needed(expert_bytes)
        if staging_bytes is not None and needed.max(initial=0) > staging_bytes:
            row, rank = np.unravel_index(int(needed.argmax()), needed.shape)
            raise PlacementError(
                f"staging_bytes {staging_bytes}: rank {rank} needs {int(needed[row, rank])} bytes "
                f"to take in layer {self.new.layer_ids[row]} ({int(self.incoming[row, rank])} "
                "experts); a layer is committed whole: give that many, or plan with fewer moves "
                "(max_moves)"
            )
        return tuple(cut(self, self._sizes(expert_bytes), staging_bytes, max_layers))

    def metadata(self) -> CommitMetadata:
        """Return the bookkeeping for carrying the plan out: only what stays is committed yet."""
        committed = np.ones(self.new.num_layers, dtype=bool)
        committed[self.changed_rows] = False
        return CommitMetadata(self.old, self.new, committed)

    def part(
        self,
        old: np.ndarray,
        new: np.ndarray,
        layer_ids: Sequence[int],
        live_ranks: Sequence[int] | None,
        expert_bytes: Sequence[int],
    ) -> ExchangePlan | None:
        """Return what of this exchange leads from table to table; None if it leads elsewhere.

        Args:
            old, new: int ``[layers, slots]`` of some of the layers.
            layer_ids: of their rows.
            live_ranks: ranks that take part; all when left out.
            expert_bytes: bytes of one expert of each of these layers.

        Raises:
            PlacementError: as `plan_exchange`.
        """
        size = _bytes_of_layers(expert_bytes, len(layer_ids))
        if not np.array_equal(self.live, _live_mask(live_ranks, self.new.num_ranks)):
            return None
        if tuple(layer_ids) == self.new.layer_ids:
            whole = self
            if not np.array_equal(size, self.expert_bytes):
                whole = replace(self, expert_bytes=size)
            return whole if self._leads(old, new, slice(None)) else None
        row_of = {layer: row for row, layer in enumerate(self.new.layer_ids)}
        rows = np.array([row_of.get(layer, -1) for layer in layer_ids])
        if rows[0] < 0 or (np.diff(rows) <= 0).any() or not self._leads(old, new, rows):
            return None
        return ExchangePlan(
            self.old.select_layers(layer_ids),
            self.new.select_layers(layer_ids),
            self.topology,
            self.live,
            size,
            self.transfers.among(rows),
            self.reads.among(rows),
            self.copies.among(rows),
        )

    def _leads(self, old: np.ndarray, new: np.ndarray, rows: np.ndarray | slice) -> bool:
        """Whether some rows of both placements are these tables."""
        tables = ((self.old, old), (self.new, new))
        return all(np.array_equal(p.physical_to_logical[rows], table) for p, table in tables)

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
    """Plan the moves that turn ``old`` into ``new`` in place.

    Args:
        old: the placement in force.
        new: the placement to go to; its ranks may have other numbers of slots, slot i of a rank
            being the same memory in both.
        topology: nodes of the ranks; one node when left out.
        live_ranks: ranks that take part; all when left out. What dead ranks held counts as lost,
            what they shall hold is ignored.
        expert_bytes: bytes of one expert, of all layers or one number per layer.

    Raises:
        PlacementError: when the placements are of different models or ranks, or the live ranks have
            no slot for an expert.
    """
    from . import plan_kernels as kernels  # lazy: numba

    check_comparable(old, new)
    ranks = new.num_ranks
    topology = Topology(ranks) if topology is None else topology
    if topology.num_ranks != ranks:
        raise PlacementError(
            f"a topology of {topology.num_ranks} EP ranks for placements on {ranks}: give the "
            "group's own"
        )
    live = _live_mask(live_ranks, ranks)
    size = _bytes_of_layers(expert_bytes, new.num_layers)
    _check_served(new, live)
    layers, slots = new.physical_to_logical.shape
    work = kernels.Work(
        transfers=np.empty((layers * slots, 6), np.int32),
        reads=np.empty((layers * slots, 4), np.int32),
        copies=np.empty((2 * layers * slots, 4), np.int32),
    )
    tables = kernels.Tables(
        old.physical_to_logical, new.physical_to_logical, old.rank_offsets, new.rank_offsets
    )
    nodes = np.array(topology.node_of_rank, dtype=np.int64)
    n, m, k = kernels.route(tables, new.num_logical_experts, live, nodes, work)
    return ExchangePlan(
        old,
        new,
        topology,
        live,
        size,
        TransferTable(work.transfers[:n].copy()),
        ReadTable(work.reads[:m].copy()),
        CopyTable(work.copies[:k].copy()),
    )


def _live_mask(live_ranks: Sequence[int] | None, ranks: int) -> np.ndarray:
    """Return which ranks are live, bool ``[ranks]``."""
    live = np.ones(ranks, dtype=bool)
    if live_ranks is not None:
        alive = [int(r) for r in live_ranks]
        wrong = [r for r in alive if not 0 <= r < ranks]
        if wrong or not alive:
            raise PlacementError(f"live_ranks {alive}: give at least one, each in 0..{ranks - 1}")
        live[:] = False
        live[alive] = True
    return live


def _bytes_of_layers(expert_bytes: int | Sequence[int] | np.ndarray, layers: int) -> np.ndarray:
    """Return the bytes of one expert of each layer, int64 ``[layers]``."""
    size = (
        np.full(layers, expert_bytes, dtype=np.int64)
        if np.ndim(expert_bytes) == 0
        else np.asarray(expert_bytes, np.int64)
    )
    if size.shape != (layers,) or (size < 0).any():
        raise PlacementError(
            f"expert_bytes {expert_bytes}: give one number >= 0, or one for each of the {layers} "
            "layers"
        )
    return size


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
            f"layer {new.layer_ids[row]}: the new placement has expert {expert} only on dead ranks "
            f"{np.flatnonzero(~live).tolist()}: give it a slot on a live rank"
        )
