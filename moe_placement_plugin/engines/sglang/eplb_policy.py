"""Put our planner behind SGLang's EPLB as an algorithm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...core.load import MIXED, ExpertLoad
from ...core.tables import inverse_maps
from ...rebalancing.rebalancer import Rebalancer
from ...rebalancing.tables import EngineRanks
from . import elastic, eplb_phases
from .state import STATE, Eplb

# Decisions are EPLB's, under whose name they are logged.
logger = logging.getLogger("moe_placement_plugin.engines.sglang.eplb")

MOST_WINDOWS = 16
"""Into how many windows the recorder's forward passes are put together to judge a plan.

There are up to a thousand passes.
"""


def rebalancer_of(eplb: Eplb, weights: Any) -> Rebalancer:
    """Make what plans and decides for the model.

    Args:
        eplb: of this process.
        weights: SGLang's list, layer -> tensors ``[slots, ...]``.
    """
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    layers = sorted(weights.keys())
    sizes = [
        sum(tensor[0].numel() * tensor.element_size() for tensor in weights[layer])
        for layer in layers
    ]
    gathers = get_moe_a2a_backend().is_none()
    return Rebalancer(eplb.policy, layers, sizes, logger, eplb.facts.topology, gathers)


def plan(
    original: Callable,
    tokens_per_expert: Any,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> Any:
    """Answer `eplb_algorithms.rebalance_experts`: with strategy eplb few moves, if they pay.

    Args:
        original: SGLang's.
        tokens_per_expert: ``[forward passes, layers, experts]``, alike on all ranks.
        num_physical_experts: per layer; num_local_physical_experts: of each rank.
        num_groups, num_nodes: expert groups, None for a model without, and nodes.
        algorithm: SGLang's, for its own planner.

    Returns:
        SGLang's maps: physical to logical, logical to physical, and the replicas of each expert.
    """
    rebalance = None if STATE.eplb is None else STATE.eplb.rebalance
    if rebalance is None or rebalance.rebalancer is None:
        return original(
            tokens_per_expert,
            num_physical_experts,
            num_local_physical_experts,
            num_groups,
            num_nodes,
            algorithm,
        )
    import torch
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    in_force = get_global_expert_location_metadata().physical_to_logical_map_cpu.numpy()
    layer_ids = rebalance.rebalancer.layer_ids
    rows = list(layer_ids)
    counts, phases = windows(
        tokens_per_expert.cpu().numpy()[:, rows],
        eplb_phases.phases_of_passes(len(tokens_per_expert)),
    )
    table = in_force.copy()
    number, live = num_physical_experts // num_local_physical_experts, elastic.live_ranks()
    if live is not None and not counts.any():
        # What was lost must find a place, whether or not anything was recorded.
        counts = np.ones_like(counts)
    if counts.any():
        load = ExpertLoad(counts / eplb_phases.ranks_that_count_a_token(), layer_ids, phases)
        ranks = EngineRanks(number, num_groups or 1, num_nodes)
        table[rows] = rebalance.propose(load, in_force[rows], ranks, live)
    usable = None
    if live is not None:
        usable = np.isin(np.arange(num_physical_experts) // num_local_physical_experts, live)
    to_physical, count = inverse_maps(table, tokens_per_expert.shape[-1], usable)
    return (
        torch.from_numpy(table.astype(np.int64)),
        torch.from_numpy(to_physical),
        torch.from_numpy(count),
    )


def windows(
    counts: np.ndarray, phases: Sequence[str], most: int = MOST_WINDOWS
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Put consecutive forward passes of a phase together, without those that saw no token.

    Args:
        counts: ``[forward passes, layers, experts]``.
        phases: of each forward pass.
        most: windows of each phase.

    Returns:
        float64 ``[windows, layers, experts]``, and the phase of each.
    """
    seen = counts.any(axis=(1, 2))
    parts: list[np.ndarray] = []
    names: list[str] = []
    for phase in dict.fromkeys(phases):
        served = counts[seen & (np.asarray(phases) == phase)]
        first = np.linspace(0, len(served), min(most, len(served)) + 1).astype(int)[:-1]
        if len(first):
            parts.append(np.add.reduceat(served, first, axis=0, dtype=np.float64))
            names += [phase] * len(first)
    if not parts:
        return np.zeros((1, *counts.shape[1:])), (MIXED,)
    return np.concatenate(parts), tuple(names)
