"""Tell which layers are on their new map, to serve after an interrupted exchange."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..core.errors import PlacementError
from ..core.placement import EngineTable, Placement


@dataclass
class CommitMetadata:
    """Tell how far an exchange has come.

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
        """Return the map of one layer, old or new, int32 ``[slots]``."""
        return (self.new if self.committed[row] else self.old).physical_to_logical[row]

    def in_force(self) -> Placement:
        """Return the placement in force, each layer old or new.

        Raises:
            PlacementError: when layers differ in slots, so that no one placement holds them.
        """
        if self.complete or not self.committed.any():
            return self.new if self.complete else self.old
        if self.old.slots_per_rank != self.new.slots_per_rank:
            raise PlacementError(
                f"{int(self.committed.sum())} of {self.committed.size} layers are on "
                f"{self.new.num_slots} slots, the others on {self.old.num_slots}: one placement "
                "cannot hold both; take the maps layer by layer (row_in_force)"
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
