"""Random placements and exchanges, and a simulator that carries a plan out over numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.exchange.chunks import Chunk
from moe_placement_plugin.exchange.plan import ExchangePlan, plan_exchange
from moe_placement_plugin.exchange.transfer_table import SCRATCH


def random_placement(
    rng: np.random.Generator, layers: int, experts: int, slots, live=None
) -> Placement:
    """A valid placement; with ``live`` every expert has a slot on one of those ranks."""
    rank_of = np.repeat(np.arange(len(slots)), slots)
    preferred = np.ones(rank_of.size, bool) if live is None else np.isin(rank_of, live)
    table = np.empty((layers, rank_of.size), np.int64)
    for row in table:
        first = rng.permutation(np.flatnonzero(preferred))[:experts]
        assert first.size == experts
        row[:] = -1
        row[first] = rng.permutation(experts)
        for s in np.flatnonzero(row < 0):
            row[s] = rng.choice(np.setdiff1d(np.arange(experts), row[rank_of == rank_of[s]]))
    return Placement(table, experts, tuple(slots))


def drifted(rng: np.random.Generator, old: Placement, live=None, share: float = 0.3) -> Placement:
    """A placement near ``old``.

    A few layers unchanged, slots of a rank shuffled, experts swapped between ranks.
    """
    table = old.physical_to_logical.copy()
    rank_of = old.rank_of_slot
    for row in table:
        if rng.random() < 0.2:
            continue
        for _ in range(int(share * row.size) + 1):
            a, b = rng.integers(row.size, size=2)
            swapped = row.copy()
            swapped[[a, b]] = swapped[[b, a]]
            if all(
                np.unique(swapped[rank_of == r]).size == (rank_of == r).sum()
                for r in (rank_of[a], rank_of[b])
            ):
                row[:] = swapped
    return Placement(table, old.num_logical_experts, old.slots_per_rank)


@st.composite
def exchanges(draw, most_ranks: int = 7) -> ExchangePlan:
    """Plans between random placements.

    Uneven slots, other numbers of slots, dead ranks, several nodes.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ranks = draw(st.integers(1, most_ranks))
    experts = draw(st.integers(1, 12))
    layers = draw(st.integers(1, 4))
    nodes = draw(st.integers(1, 3))

    def uneven() -> list[int]:
        while True:
            slots = rng.integers(0, experts + 1, ranks)
            if slots.sum() >= experts:
                return slots.tolist()

    old_slots = uneven()
    old = random_placement(rng, layers, experts, old_slots)
    new_slots = old_slots if draw(st.booleans()) else uneven()
    live = sorted(rng.permutation(ranks)[: draw(st.integers(1, ranks))].tolist())
    if sum(new_slots[r] for r in live) < experts:
        live = list(range(ranks))
    if draw(st.booleans()) and new_slots is old_slots and len(live) == ranks:
        new = drifted(rng, old)
    else:
        new = random_placement(rng, layers, experts, new_slots, live)
    topology = Topology(ranks, tuple(int(n) for n in rng.integers(nodes, size=ranks)))
    return plan_exchange(
        old, new, topology, live, draw(st.sampled_from([1, 1000, list(range(1, layers + 1))]))
    )


def expert_content(row: int, expert: int, parameter: int, width: int = 6) -> np.ndarray:
    """Bytes that tell every parameter of every expert of every layer apart."""
    return np.random.default_rng([row, expert, parameter]).integers(
        0, 256, width + parameter, dtype=np.uint8
    )


@dataclass
class SimulatedRanks:
    """Weights of all ranks: ``weights[rank][row][parameter]`` is uint8 [slots, width]."""

    weights: list[list[list[np.ndarray]]]

    @classmethod
    def holding(
        cls, placement: Placement, capacity=None, dead=(), parameters: int = 2
    ) -> SimulatedRanks:
        """What the ranks hold under a placement; dead ranks and spare slots hold noise."""
        rng = np.random.default_rng(99)
        capacity = placement.slots_per_rank if capacity is None else capacity
        weights = []
        for rank, slots in enumerate(capacity):
            rows = []
            for row in range(placement.num_layers):
                tensors = [
                    rng.integers(0, 256, (slots, expert_content(0, 0, p).size), dtype=np.uint8)
                    for p in range(parameters)
                ]
                if rank not in dead:
                    for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
                        for p, tensor in enumerate(tensors):
                            tensor[slot] = expert_content(row, expert, p)
                rows.append(tensors)
            weights.append(rows)
        return cls(weights)

    def carry_out(self, plan: ExchangePlan, chunks: tuple[Chunk, ...]) -> None:
        """Stage and commit chunk by chunk."""
        for chunk in chunks:
            staged = {}
            for row, _, source, slot, rank, to in chunk.transfers:
                assert plan.live[source] and plan.live[rank]
                staged[row, rank, to] = [t[slot].copy() for t in self.weights[source][row]]
            for row, expert, rank, to in chunk.reads:
                staged[row, rank, to] = [
                    expert_content(row, expert, p) for p in range(len(self.weights[rank][row]))
                ]
            scratch: dict[int, list[np.ndarray]] = {}
            for row, rank, source, to in chunk.copies:
                tensors = self.weights[rank][row]
                read = scratch[rank] if source == SCRATCH else [t[source].copy() for t in tensors]
                if to == SCRATCH:
                    scratch[rank] = read
                else:
                    for tensor, values in zip(tensors, read):
                        tensor[to] = values
            for (row, rank, to), values in staged.items():
                for tensor, value in zip(self.weights[rank][row], values):
                    tensor[to] = value

    def check(self, placement: Placement, ranks, rows=None) -> None:
        """Every slot of ``ranks`` holds the expert that the placement says, all parameters."""
        for rank in ranks:
            for row in range(placement.num_layers) if rows is None else rows:
                for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
                    for p, tensor in enumerate(self.weights[rank][row]):
                        assert (tensor[slot] == expert_content(row, expert, p)).all(), (
                            rank,
                            row,
                            slot,
                            expert,
                            p,
                        )
