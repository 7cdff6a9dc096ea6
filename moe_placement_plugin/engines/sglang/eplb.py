"""Under SGLang's EPLB (``--enable-eplb``): our placement to begin with, our planner to rebalance, our exchange, and a check of what moved.

SGLang's manager and recorder do what they do; they are told less often to move experts, and watched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.load import ExpertLoad
from ...exchange.watchdog import WaitingFor, Watchdog
from ...rebalancing.decision import RebalancePolicy
from ...rebalancing.rebalancer import REBALANCE_FLAG, Rebalancer, policy_from
from ...rebalancing.tables import inverse_maps
from ..common.settings import Settings
from . import (
    elastic,
    eplb_counting,
    eplb_exchange,
    eplb_phases,
    expert_reader,
)
from .hook_registry import Hook
from .hosts import real_topology
from .layers import expert_layers
from .slot_digests import digests_known, recheck, renew
from .state import placing, verifies

logger = logging.getLogger(__name__)

MOST_WINDOWS = 16
"""Into how many windows the recorder's forward passes, up to a thousand, are put together to judge a plan."""

_PLANNER = "_moe_placement_planner"  # attribute of the EPLBManager
_END = object()


def list_weights(model: Any) -> None:
    """Tell SGLang's EPLB what to move in a model that does not list it, which stock SGLang serves until the first rebalance.

    Raises:
        PlacementError: for a model with other experts in the same tensors.
    """
    # Whoever looks into a list before the first rebalance fixes its tensors, so it is only asked for.
    if getattr(model, "routed_experts_weights_of_layer", None) is not None:
        return
    from sglang.srt.utils import LazyValue

    experts = list(expert_layers(model).values())
    if any(layer.num_fused_shared_experts for layer in experts):
        raise PlacementError(
            f"--enable-eplb: {type(model).__name__} keeps shared experts among the routed ones, which EPLB cannot move: add "
            "--disable-shared-experts-fusion, or leave --enable-eplb out"
        )
    model.routed_experts_weights_of_layer = LazyValue(
        lambda: {layer.layer_id: eplb_exchange.slot_tensors(layer) for layer in experts}
    )


def warm_up(settings: Settings) -> None:
    """Compile planner and exchange while the model loads."""
    from ...rebalancing import tables  # lazy: numba

    placement = settings.plan
    assert placement is not None, "settled before a model loads"
    tables.warm_up(
        placement.physical_to_logical,
        placement.num_logical_experts,
        placement.num_ranks,
        settings.rebalancing.plans,
    )


def _known(model: Any) -> bool:
    """Whether what moves can be verified; digests of weights that were updated while serving are taken first.

    Raises:
        PlacementError: when replicas of an updated expert differ.
    """
    if not verifies():
        return False
    if elastic.may_lose_ranks():  # some may be dead: no collective
        return digests_known(model)
    return renew(model)


def rebalance(original: Callable, self: Any) -> Iterator[None]:
    """`EPLBManager.rebalance`, a generator that lets forward passes run between two chunks of layers, watched and checked.

    Raises:
        PlacementError: on every rank alike, which ends the server, when a slot holds something else than its expert.
    """
    settings = placing()
    assert settings is not None, "hooked only where a placement was asked for"
    model = self._get_model()
    policy = policy_from(settings.rebalancing.rules, REBALANCE_FLAG)
    if settings.rebalancing.plans and not hasattr(self, _PLANNER):
        setattr(self, _PLANNER, _planner(policy, model.routed_experts_weights_of_layer))
    here = eplb_exchange.Rebalance(
        Watchdog(policy.watchdog, report=logger.warning), getattr(self, _PLANNER, None)
    )
    steps = original(self)
    while True:
        eplb_exchange.under_way = here
        try:
            with here.watchdog:
                known = _known(model)
                here.watchdog.waits_for(
                    WaitingFor("all-reduce of the load", peers=eplb_exchange.others())
                )
                ended = next(steps, _END) is _END
                if here.moved and known:
                    here.watchdog.waits_for(
                        WaitingFor("verification", tuple(here.moved), peers=eplb_exchange.others())
                    )
                    recheck(
                        model,
                        "expert weights were damaged by an exchange",
                        here.moved,
                        elastic.may_lose_ranks(),
                    )
        finally:
            eplb_exchange.under_way = None
        if ended:
            return
        here.moved = []
        yield


def _planner(policy: RebalancePolicy, weights: Any) -> Rebalancer:
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    layers = sorted(weights.keys())
    sizes = [
        sum(tensor[0].numel() * tensor.element_size() for tensor in weights[layer])
        for layer in layers
    ]
    return Rebalancer(
        policy, layers, sizes, logger, real_topology(), get_moe_a2a_backend().is_none()
    )


def plan(
    original: Callable,
    tokens_per_expert: Any,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> Any:
    """`eplb_algorithms.rebalance_experts`; with strategy eplb, few moves from the placement in force, if they pay.

    Args:
        tokens_per_expert: ``[forward passes, layers, experts]``, alike on all ranks.
    """
    planner = None if eplb_exchange.under_way is None else eplb_exchange.under_way.planner
    if planner is None:
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
    rows = list(planner.layer_ids)
    counts, of = windows(
        tokens_per_expert.cpu().numpy()[:, rows], eplb_phases.of_passes(len(tokens_per_expert))
    )
    table = in_force.copy()
    ranks, live = num_physical_experts // num_local_physical_experts, elastic.live_ranks()
    if live is not None and not counts.any():
        counts = np.ones_like(
            counts
        )  # what was lost must find a place, whether or not anything was recorded
    if counts.any():
        load = ExpertLoad(counts / eplb_phases.ranks_that_count_alike(), planner.layer_ids, of)
        table[rows], _ = planner.propose(
            load, in_force[rows], ranks, num_groups or 1, num_nodes, live
        )
    usable = (
        None
        if live is None
        else np.isin(np.arange(num_physical_experts) // num_local_physical_experts, live)
    )
    to_physical, count = inverse_maps(table, tokens_per_expert.shape[-1], usable)
    return (
        torch.from_numpy(table.astype(np.int64)),
        torch.from_numpy(to_physical),
        torch.from_numpy(count),
    )


def windows(
    counts: np.ndarray, phases: Sequence[str], most: int = MOST_WINDOWS
) -> tuple[np.ndarray, tuple[str, ...]]:
    """At most ``most`` windows of each phase, of consecutive forward passes, without those that saw no token.

    Args:
        counts: ``[forward passes, layers, experts]``.
        phases: of each forward pass.

    Returns:
        float64 ``[windows, layers, experts]``, and the phase of each.
    """
    seen = counts.any(axis=(1, 2))
    parts, of = [], []
    for phase in dict.fromkeys(phases):
        served = counts[seen & (np.asarray(phases) == phase)]
        first = np.linspace(0, len(served), min(most, len(served)) + 1).astype(int)[:-1]
        if len(first):
            parts.append(np.add.reduceat(served, first, axis=0, dtype=np.float64))
            of += [phase] * len(first)
    return (
        (np.concatenate(parts), tuple(of))
        if parts
        else (np.zeros((1, *counts.shape[1:])), ("mixed",))
    )


def needed(original: Callable, self: Any, *args: Any, **kwargs: Any) -> bool:
    """`EPLBManager._check_rebalance_needed`: always after a rank has died."""
    return elastic.live_ranks() is not None or original(self, *args, **kwargs)


def eplb_hooks() -> list[Hook]:
    """Return what a worker gets besides under a placement with ``--enable-eplb``."""
    return [
        Hook(
            name="eplb-rebalance",
            target="sglang.srt.eplb.eplb_manager:EPLBManager.rebalance",
            hook=rebalance,
            relies_on=("self",),
            why="an exchange that hangs, or leaves a slot with the wrong weights, is never reported",
            upstream="SGLang #39580",
            removable_when="never: it is this plugin's own check",
        ),
        Hook(
            name="eplb-plan",
            target="sglang.srt.eplb.eplb_algorithms:rebalance_experts",
            hook=plan,
            relies_on=(
                "tokens_per_expert",
                "num_physical_experts",
                "num_local_physical_experts",
                "num_groups",
                "num_nodes",
                "algorithm",
            ),
            why="EPLB's algorithms are a closed list, never see the placement in force, and move experts whether it pays or not",
            upstream="SGLang #8345, #7879",
            removable_when="SGLang takes algorithms from plugins and hands them the placement in force",
        ),
        Hook(
            name="eplb-update",
            target="sglang.srt.eplb.expert_location_updater:ExpertLocationUpdater.update",
            hook=eplb_exchange.update,
            relies_on=(
                "routed_experts_weights_of_layer",
                "new_expert_location_metadata",
                "update_layer_ids",
            ),
            why="layers that stay are worked through, all is staged in a buffer of a whole layer, a rank that dies leaves a mix, and an expert "
            "whose chosen sender is dead goes to disk though a live rank holds it, with a full reload for all models but DeepSeek",
            upstream="SGLang #12068, #8345",
            removable_when="the updater takes executors from plugins",
        ),
        *eplb_phases.phase_hooks(),
        *eplb_counting.count_hooks(),
        Hook(
            name="eplb-needed",
            target="sglang.srt.eplb.eplb_manager:EPLBManager._check_rebalance_needed",
            hook=needed,
            relies_on=("self",),
            why="with --eplb-min-rebalancing-utilization-threshold a server whose ranks have died may not place their experts anew",
            removable_when="the threshold is not asked after a rank fault",
            optional=True,
        ),
        Hook(
            name="eplb-names",
            target="sglang.srt.model_loader.loader:DefaultModelLoader._get_weights_iterator",
            hook=expert_reader.weights,
            relies_on=("source",),
            why="which tensors hold an expert is known to the model's loader only",
            upstream="SGLang #12068",
            removable_when="every model can name the tensors of an expert (generate_weight_name_filter)",
        ),
    ]
