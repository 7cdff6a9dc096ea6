"""Compare what was routed with what the routers were made for, and place experts by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .... import ExpertLoad, Placement, PlacementError, get_strategy
from ....core.topology import Topology
from ....simulation.cluster import Cluster
from .contestants import Contestant
from .models import Model
from .report import balance_in_words


def share_elsewhere(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the share of each layer's choices that lie elsewhere, ``[layers]``.

    Args:
        ours: shares, ``[layers, experts]``.
        theirs: those that they are compared with.
    """
    return np.abs(ours - theirs).sum(axis=1) / 2


def check_recorded(load: ExpertLoad, model: Model, path: Path | None) -> None:
    """Refuse a recording of another model.

    Args:
        load: the recording.
        model: what is served.
        path: its file, as the user named it.

    Raises:
        PlacementError: naming both.
    """
    ours = (len(model.moe_layers), model.experts)
    theirs = (load.num_layers, load.num_experts)
    if ours != theirs:
        raise PlacementError(
            f"--recorded {path}: {theirs[0]} layers x {theirs[1]} experts, "
            f"the model has {ours[0]} x {ours[1]}: give the load.safetensors of a run with the "
            "same --model and --load, or leave it out"
        )


def place_static(
    contestants: Sequence[Contestant], load: ExpertLoad, model: Model, ranks: int
) -> dict[str, Placement]:
    """Place the experts of the contestants whose placement stays.

    Without a strategy it is linear.
    """
    placed = {}
    for one in contestants:
        if not one.moving and not one.even:
            cluster = Cluster(Topology.even(ranks), one.redundant, model.groups or 1)
            strategy = get_strategy(one.strategy or "linear")
            placed[one.name] = strategy.place(cluster.request(load))
    return placed


def compare_routed(load: ExpertLoad, wanted: np.ndarray, placed: Mapping[str, Placement]) -> dict:
    """Say how far a load is from what the routers were made for, and how balanced placements are.

    Args:
        load: what was routed.
        wanted: shares that the routers were made for, ``[layers, experts]``.
        placed: name -> placement that stays.

    Returns:
        ``choices``; ``apart``, layer by layer; ``balancedness`` by name.
    """
    total = load.total / np.maximum(load.total.sum(axis=1, keepdims=True), 1)
    return {
        "choices": int(load.counts.sum()),
        "apart": share_elsewhere(total, wanted).tolist(),
        "balancedness": {
            name: placement.overall_balancedness(load.total) for name, placement in placed.items()
        },
    }


def routed_in_words(routed: Mapping) -> str:
    """Describe what `compare_routed` found in one line."""
    return (
        f"{routed['choices']} choices, {np.mean(routed['apart']):.1%} of them elsewhere than in "
        "the load that the routers follow; balancedness "
        f"{balance_in_words(routed['balancedness'])}"
    )
