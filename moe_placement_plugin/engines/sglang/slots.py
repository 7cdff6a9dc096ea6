"""Make the placement with as many slots on every rank as SGLang needs, in the launcher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape
from ...core.placement import Placement
from ...core.tables import least_copied
from ...core.topology import Topology
from ...formats.plan_or_load import read
from ...strategies.resolve import check_plan, resolve_placement
from ..common.request import Request


@dataclass(frozen=True)
class Slots:
    """Say how many slots a layer gets, as many on every rank as SGLang needs.

    Attributes:
        ranks: EP ranks.
        nodes: hosts that they are spread over.
        wanted: redundant experts that the user asked for.
        padding: further ones, so that the slots divide over the ranks.
    """

    ranks: int
    nodes: int = 1
    wanted: int = 0
    padding: int = 0

    @property
    def redundant(self) -> int:
        """Return all redundant experts of a layer."""
        return self.wanted + self.padding


def place(request: Request, shape: ModelShape, slots: Slots, moves: bool = False) -> Placement:
    """Make the placement.

    Args:
        request: the flags.
        shape: the model's MoE layers.
        slots: of a layer.
        moves: whether SGLang's EPLB moves experts, beginning with this placement.

    Raises:
        PlacementError: when the request cannot be honoured.
    """
    ranks = slots.ranks
    topology = Topology.even(ranks, slots.nodes if ranks % slots.nodes == 0 else 1)
    per_rank = ((shape.num_experts + slots.redundant) // ranks,) * ranks
    if request.file is not None:
        plan = read(request.file, ranks, shape.num_experts)
        if isinstance(plan, Placement):
            fits = plan.num_redundant == slots.wanted and plan.num_ranks == ranks
            if fits and slots.padding:
                plan = fill_up(plan, per_rank[0])
            _check_slots(plan, shape, slots, request.file)
            if request.locality in (None, "none"):  # else resolve_placement refuses
                return check_plan(plan, shape, topology, slots.redundant, per_rank, request.file)
    elif moves and request.strategy == "eplb":
        # It plans from what EPLB records, beginning where EPLB does.
        row = np.arange(shape.num_experts + slots.redundant) % shape.num_experts
        table = np.tile(row, (len(shape.layer_ids), 1))
        return Placement(table, shape.num_experts, per_rank, shape.layer_ids, "eplb")
    return resolve_placement(
        request.strategy,
        request.file,
        shape,
        topology,
        slots.redundant,
        per_rank,
        request.locality or "none",
    )


def _check_slots(plan: Placement, shape: ModelShape, slots: Slots, file: str) -> None:
    """Say in SGLang's own terms when a plan's slots do not fit ``--ep-num-redundant-experts``."""
    fits = plan.num_logical_experts == shape.num_experts and plan.num_ranks == slots.ranks
    if fits and plan.num_redundant != slots.redundant:
        padded = f" (and {slots.padding} to fill the ranks up)" if slots.padding else ""
        raise PlacementError(
            f"{file} is a plan with {plan.num_redundant} redundant experts per layer, the server "
            f"has --ep-num-redundant-experts {slots.wanted}{padded}: start it with "
            f"--ep-num-redundant-experts {plan.num_redundant}, or plan with {slots.redundant}"
        )


def fill_up(plan: Placement, slots: int) -> Placement:
    """Give further replicas to the ranks of a plan that have fewer than ``slots`` slots.

    A plan of an engine with uneven ranks (vLLM) keeps every expert where it is; a short rank also
    gets the experts with the fewest copies that it does not hold yet, lowest id first.
    """
    if max(plan.slots_per_rank) > slots:
        return plan
    table = np.empty((plan.num_layers, slots * plan.num_ranks), dtype=np.int32)
    for row in range(plan.num_layers):
        held = [plan.local_experts(row, rank).tolist() for rank in range(plan.num_ranks)]
        copies = plan.replica_counts[row].copy()
        for local in held:
            while len(local) < slots:
                expert = least_copied(copies, local)
                copies[expert] += 1
                local.append(expert)
        table[row] = np.concatenate(held)
    return replace(plan, physical_to_logical=table, slots_per_rank=(slots,) * plan.num_ranks)
