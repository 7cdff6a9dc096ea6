"""Define what a strategy is asked and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement, even_slots
from ..core.topology import Topology
from ..planner.options import LOCALITIES


@dataclass(frozen=True)
class PlacementRequest:
    """Describe a model and a cluster to place its experts on.

    Attributes:
        num_layers: MoE layers.
        num_experts: logical experts per layer.
        topology: the EP ranks.
        num_redundant: physical experts beyond one per logical expert, per layer.
        slots_per_rank: slots of each rank; dealt out as evenly as possible when left empty.
        layer_ids: index of each layer within the model, ``[layers]``; ``0..layers-1`` when left
            empty.
        num_groups: expert groups of grouped top-k routing, 1 when the model has none.
        load: the recorded load, ``[windows, layers, experts]``, for strategies that plan from one.
        locality: how strategies that plan from a load treat nodes: ``none``; ``node``: the experts
            of a group stay on one node; ``soft``: load leaves its node at a price, and experts that
            are chosen together share one where the load has co-activation.
        metadata: facts that the placement is to carry, JSON-compatible.

    Raises:
        PlacementError: when the numbers do not fit together.
    """

    num_layers: int
    num_experts: int
    topology: Topology
    num_redundant: int = 0
    slots_per_rank: tuple[int, ...] = ()
    layer_ids: tuple[int, ...] = ()
    num_groups: int = 1
    load: ExpertLoad | None = None
    locality: str = "none"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_experts < 1:
            raise PlacementError(
                f"{self.num_layers} MoE layers of {self.num_experts} experts: nothing to place; "
                "is this an MoE model?"
            )
        if self.num_redundant < 0:
            raise PlacementError(f"{self.num_redundant} redundant experts: give 0 or more")
        slots = self.num_experts + self.num_redundant
        per_rank = tuple(self.slots_per_rank) or even_slots(slots, self.topology.num_ranks)
        if len(per_rank) != self.topology.num_ranks or sum(per_rank) != slots:
            raise PlacementError(
                f"slots_per_rank {list(per_rank)} for {self.topology.num_ranks} ranks and {slots} "
                f"slots: give one number per rank, {slots} in all"
            )
        if max(per_rank) > self.num_experts:
            raise PlacementError(
                f"{self.num_redundant} redundant experts give a rank {max(per_rank)} slots for "
                f"{self.num_experts} experts: a second copy on a rank is of no use; ask for fewer "
                "redundant experts"
            )
        object.__setattr__(self, "slots_per_rank", per_rank)
        object.__setattr__(
            self, "layer_ids", tuple(self.layer_ids) or tuple(range(self.num_layers))
        )
        if self.locality not in LOCALITIES:
            raise PlacementError(
                f"locality {self.locality!r}: choose one of {', '.join(LOCALITIES)}"
            )
        if self.load is not None and self.load.counts.shape[1:] != (
            self.num_layers,
            self.num_experts,
        ):
            raise PlacementError(
                f"the load has {self.load.num_layers} layers of {self.load.num_experts} experts, "
                f"the model has {self.num_layers} MoE layers of {self.num_experts}: it was "
                "recorded on another model; record on this one"
            )

    @property
    def num_slots(self) -> int:
        """Count the physical experts of a layer."""
        return self.num_experts + self.num_redundant


class Strategy(ABC):
    """Decide where experts lie.

    Attributes:
        name: the value of ``--expert-placement-strategy``.
        needs_load: whether `place` needs ``request.load``.
    """

    name: ClassVar[str]
    needs_load: ClassVar[bool] = False

    @abstractmethod
    def place(self, request: PlacementRequest) -> Placement:
        """Make a valid placement for ``request``.

        Raises:
            PlacementError: when the strategy cannot place this request.
        """

    def _placement(self, request: PlacementRequest, table: np.ndarray) -> Placement:
        """Make the placement of ``table``, int ``[slots]`` or ``[layers, slots]``."""
        return Placement(
            physical_to_logical=np.broadcast_to(table, (request.num_layers, request.num_slots)),
            num_logical_experts=request.num_experts,
            slots_per_rank=request.slots_per_rank,
            layer_ids=request.layer_ids,
            strategy=self.name,
            metadata=request.metadata,
        )
