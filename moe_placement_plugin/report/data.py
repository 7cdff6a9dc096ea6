"""Compute what the page and the figures draw, and what ``--json`` of the verbs holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..simulation.cluster import Workload, rows_for
from ..simulation.simulate import Outcome, Simulation

if TYPE_CHECKING:
    from ..recording.send_prompts import Sent
    from ..simulation.costmodel import Calibration


@dataclass(frozen=True)
class PlacementView:
    """Hold how one strategy or plan fares on a load.

    Attributes:
        name: its name.
        rank_load: rank load / mean, ``[layers, ranks]``.
        per_layer: balancedness, ``[layers]``.
        per_window: balancedness, ``[windows]``.
        overall: balancedness over layers and windows.
        description: the plan in one line.
    """

    name: str
    rank_load: np.ndarray
    per_layer: np.ndarray
    per_window: np.ndarray
    overall: float
    description: str


@dataclass(frozen=True)
class Report:
    """Hold everything that is drawn.

    Attributes:
        title: heading.
        facts: (name, value) pairs.
        layer_ids: index of each layer within the model, ``[layers]``.
        window_names: ``[windows]``.
        load: tokens per expert / mean of the layer, ``[layers, experts]``.
        tokens: tokens per layer (times experts per token), ``[layers]``.
        placements: strategies and plans.
        coactivation: layer id -> tokens that chose both, ``[experts, experts]``.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    layer_ids: tuple[int, ...]
    window_names: tuple[str, ...]
    load: np.ndarray
    tokens: np.ndarray
    placements: Sequence[PlacementView]
    coactivation: Mapping[int, np.ndarray]


def make_report(
    names: Sequence[str],
    loads: Sequence[ExpertLoad],
    placements: Mapping[str, Placement],
    layer: int | None = None,
) -> Report:
    """Make the report on loads of one model, aligned to the same layers.

    Args:
        names: of the loads.
        loads: one or more.
        placements: name -> placement of the same model.
        layer: whose co-activation is drawn; the most skewed layer's when None.

    Raises:
        PlacementError: when a placement does not fit, or the layer was not recorded.
    """
    from .tables import FACTS, count, describe  # lazy: heavy

    together = ExpertLoad.concatenate(list(loads))
    total = together.total.astype(float)
    mean = np.maximum(total.mean(axis=1, keepdims=True), 1e-12)
    views = []
    for name, placement in placements.items():
        placement = rows_for(placement, together, name)
        windows = placement.rank_load(together.counts)
        ranks = windows.sum(axis=0)
        greatest = windows.max(axis=-1).sum(axis=1)
        per_window = np.divide(
            windows.mean(axis=-1).sum(axis=1),
            greatest,
            out=np.ones_like(greatest),
            where=greatest > 0,
        )
        views.append(
            PlacementView(
                name,
                ranks / np.maximum(ranks.mean(axis=1, keepdims=True), 1e-12),
                placement.balancedness(together.total),
                per_window,
                placement.overall_balancedness(together.counts),
                describe(placement),
            )
        )
    facts = [(key, str(together.metadata[key])) for key in FACTS if together.metadata.get(key)]
    facts += [
        ("layers", str(together.num_layers)),
        ("experts per layer", str(together.num_experts)),
        ("windows", str(together.num_windows)),
        ("routed tokens", count(float(total.sum()))),
    ]
    return Report(
        " + ".join(names),
        facts,
        together.layer_ids,
        tuple(_window_names(names, loads)),
        total / mean,
        total.sum(axis=1),
        views,
        _pairs(together, layer),
    )


def _window_names(names: Sequence[str], loads: Sequence[ExpertLoad]) -> list[str]:
    result = []
    for name, load in zip(names, loads):
        for index, phase in enumerate(load.phases):
            words = [name] if len(loads) > 1 or load.num_windows == 1 else []
            words += [f"window {index + 1}"] if load.num_windows > 1 else []
            words += [phase] if phase != "mixed" else []
            result.append(", ".join(words))
    return result


def _pairs(load: ExpertLoad, layer: int | None) -> dict[int, np.ndarray]:
    if layer is not None and layer not in load.layer_ids:
        raise PlacementError(
            f"--layer {layer}: the load has layers {load.layer_ids[0]}..{load.layer_ids[-1]}; give "
            "one of them"
        )
    if load.coactivation is None:
        if layer is not None:
            raise PlacementError(
                f"--layer {layer}: the load holds no co-activation; record with "
                "--expert-load-coactivation"
            )
        return {}
    total = load.total
    row = (
        load.layer_ids.index(layer)
        if layer is not None
        else int((total.max(axis=1) / np.maximum(total.mean(axis=1), 1e-12)).argmax())
    )
    return {load.layer_ids[row]: load.coactivation[row]}


def load_facts(load: ExpertLoad) -> dict[str, Any]:
    """Return what ``show --json`` says of a load."""
    return {
        "layer_ids": load.layer_ids,
        "experts": load.num_experts,
        "phases": load.phases,
        "tokens": load.total.sum(axis=1),
        "max_over_mean": load.total.max(axis=1) / load.total.mean(axis=1).clip(1e-12),
        "hottest": load.total.argsort(axis=1)[:, ::-1][:, :3],
        "coactivation": load.coactivation is not None,
        "metadata": dict(load.metadata),
    }


def plan_facts(plan: Placement) -> dict[str, Any]:
    """Return what ``show --json`` says of a plan."""
    return {
        "strategy": plan.strategy,
        "digest": plan.digest,
        "layer_ids": plan.layer_ids,
        "experts": plan.num_logical_experts,
        "slots_per_rank": plan.slots_per_rank,
        "redundant": plan.num_redundant,
        "most_copies": int(plan.replica_counts.max()),
        "metadata": dict(plan.metadata),
    }


def shown_facts(
    workloads: Sequence[Workload],
    together: ExpertLoad,
    plans: Mapping[str, Placement],
    placements: Mapping[str, Placement],
) -> dict[str, Any]:
    """Return what ``show --json`` says of loads and plans, without the files that were written.

    Args:
        workloads: the loads.
        together: all of them as one.
        plans: name -> plan, of those that were given.
        placements: name -> placement, of plans and strategies.
    """
    return {
        "loads": {w.name: load_facts(w.load) for w in workloads},
        "plans": {name: plan_facts(plan) for name, plan in plans.items()},
        "balancedness": {
            name: {
                "overall": plan.overall_balancedness(together.counts),
                "per_layer": plan.balancedness(together.total),
            }
            for name, plan in placements.items()
        },
    }


def prediction_facts(
    made: Placement, before: Placement, workloads: Sequence[Workload], together: ExpertLoad
) -> dict[str, Any]:
    """Return what ``plan --json`` predicts of a plan, beside the engine's default placement.

    Args:
        made: the plan.
        before: the engine's default.
        workloads: the loads that it was planned for.
        together: all of them as one.
    """
    return {
        "strategy": made.strategy,
        "ranks": made.num_ranks,
        "redundant": made.num_redundant,
        "layer_ids": list(made.layer_ids),
        "balancedness": made.overall_balancedness(together.counts),
        "linear_balancedness": before.overall_balancedness(together.counts),
        "balancedness_per_layer": made.balancedness(together.total),
        "balancedness_per_workload": {
            w.name: made.overall_balancedness(w.load.counts) for w in workloads
        },
    }


def recording_facts(path: str, load: ExpertLoad, sent: Sent | None) -> dict[str, Any]:
    """Return what ``record --json`` says of a recording, and of the prompts that were sent for it.

    Args:
        path: the recording's file.
        load: what it holds.
        sent: what was sent, None when it was only read.
    """
    return {
        "recording": path,
        "layer_ids": load.layer_ids,
        "experts": load.num_experts,
        "phases": load.phases,
        "routed_tokens": load.counts.sum(),
        "metadata": dict(load.metadata),
        "sent": None
        if sent is None
        else {
            "requests": sent.requests,
            "prompt_tokens": sent.prompt_tokens,
            "generated_tokens": sent.generated_tokens,
            "seconds": sent.seconds,
        },
    }


def simulation_facts(found: Simulation, measured: Calibration | None) -> dict[str, Any]:
    """Return what ``simulate --json`` says.

    Args:
        found: the simulation.
        measured: the calibration that its cost model was fitted to, or None.
    """
    return {
        "workloads": [w.name for w in found.workloads],
        "layer_ids": found.workloads[0].load.layer_ids,
        "dead_zone": found.dead_zone,
        "best": found.best.name,
        "verdict": found.verdict(),
        "cost_model": None
        if found.cost is None or measured is None
        else vars(found.cost) | {"device": measured.device, "layer": measured.layer},
        "outcomes": [_outcome_facts(outcome) for outcome in found.outcomes],
    }


def _outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """Return what a simulation found of one strategy or plan."""
    step = outcome.step
    return {
        "name": outcome.name,
        "balancedness": outcome.overall,
        "max_over_mean": outcome.max_over_mean,
        "per_layer": outcome.per_layer,
        "per_window": outcome.per_window,
        "next_window": outcome.next_window,
        "served": outcome.served,
        "step": None
        if step is None
        else {
            "tokens": step.tokens,
            "layer_us": step.layer_us,
            "ideal_us": step.ideal_us,
            "total_us": step.total_us,
        },
    }
