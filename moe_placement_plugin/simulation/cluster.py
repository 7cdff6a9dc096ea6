"""Say what is to be placed, and where: loads by name, the ranks, plans fitted to both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..core.topology import Topology
from ..strategies import PlacementRequest


@dataclass(frozen=True)
class Workload:
    """Hold a recorded load and what to call it."""

    name: str
    load: ExpertLoad


@dataclass(frozen=True)
class Cluster:
    """Say where experts are to be placed.

    Attributes:
        topology: the EP ranks.
        num_redundant: redundant experts per layer.
        num_groups: expert groups of grouped top-k routing.
        locality: see `PlacementRequest.locality`.
    """

    topology: Topology
    num_redundant: int = 0
    num_groups: int = 1
    locality: str = "none"

    def request(self, load: ExpertLoad) -> PlacementRequest:
        """Return the request to place the load's model here."""
        return PlacementRequest(
            num_layers=load.num_layers,
            num_experts=load.num_experts,
            topology=self.topology,
            num_redundant=self.num_redundant,
            layer_ids=load.layer_ids,
            num_groups=self.num_groups,
            load=load,
            locality=self.locality,
        )


def align(workloads: Sequence[Workload]) -> list[Workload]:
    """Return the workloads on the layers in which any of them saw a token.

    Raises:
        PlacementError: when they are of different models or all are empty.
    """
    first = workloads[0].load
    used: set[int] = set()
    for workload in workloads:
        load = workload.load
        if load.num_experts != first.num_experts or load.layer_ids != first.layer_ids:
            raise PlacementError(
                f"{workloads[0].name} has {first.num_layers} layers x {first.num_experts} experts, "
                f"{workload.name} has {load.num_layers} x {load.num_experts}: loads to be taken "
                "together must be of one model"
            )
        try:
            used |= set(load.moe_layers().layer_ids)
        except PlacementError as error:
            raise PlacementError(f"{workload.name}: {error}") from None
    layers = [i for i in first.layer_ids if i in used]
    return [Workload(w.name, w.load.select_layers(layers)) for w in workloads]


def rows_for(plan: Placement, load: ExpertLoad, name: str) -> Placement:
    """Return the rows of a plan for the layers of a load.

    Args:
        plan: a placement of the load's model.
        load: whose layers are wanted.
        name: what to call the plan in messages.

    Raises:
        PlacementError: when the plan is for another model.
    """
    if plan.num_logical_experts != load.num_experts:
        raise PlacementError(
            f"{name} is a plan for {plan.num_logical_experts} experts, the load has "
            f"{load.num_experts}: they are of different models"
        )
    if set(load.layer_ids) <= set(plan.layer_ids):
        return plan.select_layers(load.layer_ids)
    if plan.num_layers == load.num_layers:  # one of the two numbers MoE layers only
        return type(plan)(
            plan.physical_to_logical,
            plan.num_logical_experts,
            plan.slots_per_rank,
            load.layer_ids,
            plan.strategy,
            plan.metadata,
        )
    raise PlacementError(
        f"{name} is a plan for {plan.num_layers} layers, the load has tokens in {load.num_layers} "
        f"({load.layer_ids[0]}..{load.layer_ids[-1]}): they are of different models"
    )
