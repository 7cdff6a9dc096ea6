"""Turn what the user asked for into a placement that fits the model, or into one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.model_shape import ModelShape
from ..core.placement import Placement
from ..core.topology import Topology
from ..formats.plan_or_load import read
from .base import PlacementRequest, Strategy
from .registry import get_strategy


def resolve_placement(
    strategy: str,
    file: str | Path | None,
    shape: ModelShape,
    topology: Topology,
    num_redundant: int = 0,
    slots_per_rank: tuple[int, ...] = (),
    locality: str = "none",
) -> Placement:
    """Make what ``--expert-placement-strategy`` and ``--expert-placement-file`` ask for.

    A plan file wins over the strategy. A recorded load goes to a strategy that plans from one
    (``linear``, being the default, then means ``eplb``).

    Args:
        strategy: name of a strategy.
        file: a plan or a recorded load, or None.
        shape: the model's MoE layers, and the draft that a plan may have rows for.
        topology: the EP ranks.
        num_redundant: redundant experts per layer that the engine is started with.
        slots_per_rank: slots of each rank where the engine prescribes them.
        locality: see `PlacementRequest.locality`; for a strategy that plans from a load.

    Raises:
        PlacementError: when the request cannot be honoured.
    """
    planner = get_strategy(strategy)
    load = None
    if file is not None:
        given = read(file, topology.num_ranks, shape.num_experts)
        if isinstance(given, Placement):
            _check_locality_of_plan(locality, file)
            check_draft_rows(given, shape.draft, topology, str(file))
            return check_plan(given, shape, topology, num_redundant, slots_per_rank, str(file))
        planner = _planner_for_load(planner, strategy, file)
        load = _load_of_model(given, shape, file)
    elif planner.needs_load:
        raise PlacementError(
            f"strategy {strategy} places experts by a recorded load and has none: add "
            "--expert-placement-file with a recorded load or a plan, or choose zigzag or balanced"
        )
    if locality != "none" and load is None:
        raise PlacementError(
            f"--expert-placement-locality {locality} with strategy {strategy}, which does not "
            "plan from a load: use eplb with a recorded load, or leave the flag out"
        )
    metadata: dict[str, Any] = {"model": shape.name}
    if file is not None:
        metadata["load"] = Path(file).name
    if locality != "none":
        metadata |= {"locality": locality, "node_of_rank": list(topology.node_of_rank)}
    return planner.place(
        PlacementRequest(
            num_layers=len(shape.layer_ids),
            num_experts=shape.num_experts,
            topology=topology,
            num_redundant=num_redundant,
            slots_per_rank=slots_per_rank,
            layer_ids=shape.layer_ids,
            num_groups=shape.num_groups,
            load=load,
            locality=locality,
            metadata=metadata,
        )
    )


def _check_locality_of_plan(locality: str, file: str | Path) -> None:
    """Refuse a rule about nodes beside a plan, which decides alone."""
    if locality != "none":
        raise PlacementError(
            f"--expert-placement-locality {locality} with {file}, which is a plan and "
            f"decides alone: make it with `moe-placement plan --locality {locality}`, or "
            "leave the flag out"
        )


def _planner_for_load(planner: Strategy, strategy: str, file: str | Path) -> Strategy:
    """Return the strategy that plans from a load: the one asked for, or ``eplb`` for ``linear``."""
    if planner.needs_load:
        return planner
    if planner.name != "linear":
        raise PlacementError(
            f"{file} is a recorded load, which strategy {strategy} does not use: choose "
            "eplb, or give a plan file"
        )
    return get_strategy("eplb")


def _load_of_model(load: ExpertLoad, shape: ModelShape, file: str | Path) -> ExpertLoad:
    """Return the load of the model's MoE layers, each of which must have seen tokens."""
    try:
        if load.num_experts != shape.num_experts:
            raise PlacementError(
                f"the load has {load.num_experts} experts per layer, the model has "
                f"{shape.num_experts}: it was recorded on another model; record on this one"
            )
        load = load.select_layers(shape.layer_ids)
        load.require_tokens(shape.layer_ids)
    except PlacementError as error:
        raise PlacementError(f"{file}: {error}") from None
    return load


def check_draft_rows(
    plan: Placement, draft: ModelShape | None, topology: Topology, source: str
) -> None:
    """Refuse a plan whose rows for a draft fit no draft of this engine.

    Args:
        plan: as it was read.
        draft: the draft's experts; None where the engine runs no draft with experts, or does not
            place it by a plan.
        topology: the EP ranks.
        source: names the plan in errors.

    Raises:
        PlacementError: naming the plan and what does not fit.
    """
    rows = plan.draft
    if rows is None:
        return
    if draft is None:
        raise PlacementError(
            f"{source} has rows for a draft (layers {list(rows.layer_ids)}), and this engine runs "
            "no draft with experts, or places it by itself (--enable-eplb): leave the draft's "
            "rows out"
        )
    if rows.num_logical_experts != draft.num_experts:
        raise PlacementError(
            f"{source} has rows for a draft with {rows.num_logical_experts} experts, the draft "
            f"{draft.name} has {draft.num_experts}: plan for this draft, or leave the draft's "
            "rows out"
        )
    if rows.num_ranks != topology.num_ranks or rows.num_redundant:
        raise PlacementError(
            f"{source} has rows for a draft on {rows.num_ranks} EP ranks with "
            f"{rows.num_redundant} redundant experts, the engine runs {topology.num_ranks} and 0: "
            "plan the draft for that, or leave its rows out"
        )


def check_plan(
    plan: Placement,
    shape: ModelShape,
    topology: Topology,
    num_redundant: int,
    slots_per_rank: tuple[int, ...] = (),
    source: str = "the plan",
) -> Placement:
    """Return the rows of ``plan`` for this model's MoE layers.

    Args:
        plan: as it was read.
        shape: the model's MoE layers.
        topology: the EP ranks.
        num_redundant: redundant experts per layer that the engine is started with.
        slots_per_rank: slots of each rank where the engine prescribes them.
        source: names the plan in errors.

    Raises:
        PlacementError: when the plan is for other experts, ranks, layers or slots.
    """
    if plan.num_logical_experts != shape.num_experts:
        raise PlacementError(
            f"{source} is a plan for {plan.num_logical_experts} experts, the model has "
            f"{shape.num_experts}: plan for this model"
        )
    if plan.num_ranks != topology.num_ranks:
        raise PlacementError(
            f"{source} is a plan for {plan.num_ranks} EP ranks, the engine runs "
            f"{topology.num_ranks}: plan for {topology.num_ranks} ranks, or start the engine with "
            f"{plan.num_ranks}"
        )
    if plan.num_redundant != num_redundant:
        raise PlacementError(
            f"{source} is a plan with {plan.num_redundant} redundant experts, the engine is "
            f"started with {num_redundant}: plan with {num_redundant}, or start the engine with "
            f"{plan.num_redundant}"
        )
    if slots_per_rank and plan.slots_per_rank != tuple(slots_per_rank):
        raise PlacementError(
            f"{source} gives the ranks {list(plan.slots_per_rank)} slots, this engine needs "
            f"{list(slots_per_rank)}: plan with equal ranks"
        )
    if plan.layer_ids == shape.layer_ids:
        return plan
    if plan.layer_ids == tuple(range(plan.num_layers)) and plan.num_layers == len(shape.layer_ids):
        # Numbered by MoE layers only.
        return replace(plan, layer_ids=shape.layer_ids)
    if min(plan.layer_ids) > shape.layer_ids[-1]:
        raise PlacementError(
            f"{source} is a plan for layers {list(plan.layer_ids)} only, behind the model's last "
            f'MoE layer {shape.layer_ids[-1]}: a draft\'s rows stand under "draft" beside the '
            "model's own, which a plan must have"
        )
    if not set(shape.layer_ids) <= set(plan.layer_ids):
        raise PlacementError(
            f"{source} is a plan for {plan.num_layers} layers, the model has "
            f"{len(shape.layer_ids)} MoE layers ({shape.layer_ids[0]}..{shape.layer_ids[-1]}): "
            "plan for this model"
        )
    extra = set(plan.layer_ids) - set(shape.layer_ids)
    if max(extra) > shape.layer_ids[-1]:
        raise PlacementError(
            f"{source} is a plan for {plan.num_layers} layers up to {max(plan.layer_ids)}, the "
            f"model's last MoE layer is {shape.layer_ids[-1]}: plan for this model"
        )
    return plan.select_layers(shape.layer_ids)
