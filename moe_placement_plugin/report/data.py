"""What the page and the figures draw, computed once from a load and placements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..simulation.cluster import rows_for


@dataclass(frozen=True)
class PlacementView:
    """One strategy or plan on a load.

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
    """Everything that is drawn.

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
    """The report on loads of one model, aligned to the same layers.

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
            f"--layer {layer}: the load has layers {load.layer_ids[0]}..{load.layer_ids[-1]}; give one of them"
        )
    if load.coactivation is None:
        if layer is not None:
            raise PlacementError(
                f"--layer {layer}: the load holds no co-activation; record with --expert-load-coactivation"
            )
        return {}
    total = load.total
    row = (
        load.layer_ids.index(layer)
        if layer is not None
        else int((total.max(axis=1) / np.maximum(total.mean(axis=1), 1e-12)).argmax())
    )
    return {load.layer_ids[row]: load.coactivation[row]}
