"""Turn one layer's placement into the tables that a rank looks tokens up in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...core.errors import PlacementError
from ...core.placement import Placement

# Floor(2**32 / golden ratio), as vLLM's eplb_map_to_physical_and_record multiplies by
_KNUTH = 2654435769


@dataclass(frozen=True, eq=False)
class PlacedExperts:
    """Hold where the experts of one layer lie, on one rank's device.

    Attributes:
        rank: this EP rank.
        slots_per_rank: slots of each rank, ``[ranks]``.
        replicas: int64 ``[experts, most replicas]``, slots of each logical expert, -1 as padding.
        replica_counts: int64 ``[experts]``.
        rank_of_slot: int64 ``[slots]``.
        slot_on_rank: int32 ``[slots]``, each slot's number on its own rank.
        local_slot: int32 ``[slots + 1]``, local slot on this rank or -1; the last entry is for
            padding.
    """

    rank: int
    slots_per_rank: tuple[int, ...]
    replicas: torch.Tensor
    replica_counts: torch.Tensor
    rank_of_slot: torch.Tensor
    slot_on_rank: torch.Tensor
    local_slot: torch.Tensor

    @classmethod
    def of(
        cls, placement: Placement, row: int, rank: int, device: torch.device | str = "cpu"
    ) -> PlacedExperts:
        """Make the tables of a placement's row for a rank.

        Raises:
            PlacementError: when the placement has no such rank.
        """
        if not 0 <= rank < placement.num_ranks:
            raise PlacementError(
                f"rank {rank} of a placement for {placement.num_ranks} ranks: plan for as many "
                "ranks as the group has"
            )

        def table(array, dtype=torch.int64) -> torch.Tensor:
            return torch.as_tensor(array.copy(), dtype=dtype, device=device)

        rank_of_slot = table(placement.rank_of_slot)
        slot_on_rank = (
            torch.arange(placement.num_slots, device=device)
            - table(placement.rank_offsets)[rank_of_slot]
        )
        local = torch.where(rank_of_slot == rank, slot_on_rank, -1)
        return cls(
            rank,
            placement.slots_per_rank,
            table(placement.logical_to_physical[row]),
            table(placement.replica_counts[row]),
            rank_of_slot,
            slot_on_rank.int(),
            torch.cat([local, local.new_full((1,), -1)]).int(),
        )

    @property
    def num_ranks(self) -> int:
        """Return the number of EP ranks."""
        return len(self.slots_per_rank)

    @property
    def num_slots(self) -> int:
        """Return the number of physical experts of all ranks."""
        return self.rank_of_slot.shape[0]

    @property
    def num_local(self) -> int:
        """Return the number of physical experts of this rank."""
        return self.slots_per_rank[self.rank]

    def deal(
        self, experts: torch.Tensor, first_token: int = 0, dealing: Literal["hash", "turn"] = "hash"
    ) -> torch.Tensor:
        """Choose physical experts for logical ones, replicas by the token's index alone.

        Args:
            experts: int64 ``[tokens, top_k]``, logical experts.
            first_token: index of the first token within this rank's batch, so that a chunk is dealt
                as the batch is.
            dealing: ``"hash"`` as vLLM (Knuth's multiplicative hash of the token index, modulo the
                replicas), ``"turn"`` as SGLang (the token index modulo the replicas).

        Returns:
            int64 ``[tokens, top_k]``, slots.
        """
        if self.replicas.shape[1] == 1:
            return self.replicas[:, 0][experts]
        token = torch.arange(first_token, first_token + experts.shape[0], device=experts.device)
        if dealing == "hash":
            token = (token * _KNUTH) & 0xFFFFFFFF
        elif dealing != "turn":
            raise PlacementError(f"dealing {dealing!r}: choose hash (as vLLM) or turn (as SGLang)")
        copy = token[:, None] % self.replica_counts[experts]
        return self.replicas[experts, copy]
