"""Under SGLang's EPLB (``--enable-eplb``): our placement to begin with, our planner to rebalance, and a check of what moved.

SGLang's manager, recorder and updater do what they do; they are told less often to move experts, and watched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from ...errors import PlacementError
from ...exchange.decision import RebalancePolicy
from ...exchange.watchdog import WaitingFor, Watchdog
from ...load import ExpertLoad
from ..rebalancing import REBALANCE_FLAG, Rebalancer, policy_from
from . import loaded, settings
from .eplb_algorithm import inverse_maps
from .hooks import Hook, HookSet
from .hosts import real_topology
from .verify import expert_layers, recheck

logger = logging.getLogger(__name__)

MOST_WINDOWS = 16
"""Into how many windows the recorder's forward passes, up to a thousand, are put together to judge a plan."""

_PLANNER = "_moe_placement_planner"  # attribute of the EPLBManager
_END = object()

_under_way: _Rebalance | None = None


def settle(asked: settings.Settings, cfg: Any) -> None:
    """Note whether experts move while serving, and refuse what would not go well.

    Args:
        asked: the flags.
        cfg: SGLang's resolved arguments.

    Raises:
        PlacementError: naming the argument, the reason and the mend.
    """
    asked.moves = bool(getattr(cfg, "enable_eplb", False))
    ours = asked.moves and asked.plans
    if asked.rebalance is not None:
        if not ours:
            raise PlacementError(
                f"{REBALANCE_FLAG} without --enable-eplb and --expert-placement-strategy eplb: nothing of ours rebalances; add both, or leave it out"
            )
        policy_from(asked.rebalance, REBALANCE_FLAG)
    if not asked.moves:
        return
    flag = "--enable-eplb with an expert placement"
    if int(cfg.tp_size) != int(cfg.ep_size):
        raise PlacementError(
            f"{flag}, --tp-size {cfg.tp_size} and --ep-size {cfg.ep_size}: SGLang's updater takes the TP rank for the EP rank and would move the "
            "wrong experts; make them equal, or leave --enable-eplb out"
        )
    if int(cfg.pp_size) > 1:
        raise PlacementError(
            f"{flag} and --pp-size {cfg.pp_size}: SGLang's updater sends to ranks of the first pipeline stage; leave one of the two out"
        )
    if str(getattr(cfg.load_format, "value", cfg.load_format)) == "dummy":
        raise PlacementError(
            f"{flag} and --load-format dummy: most models list the weights to move only while they load a checkpoint; leave --enable-eplb out"
        )
    algorithm = str(getattr(cfg, "eplb_algorithm", "auto"))
    if ours and algorithm != "auto":
        raise PlacementError(
            f"--eplb-algorithm {algorithm} together with --expert-placement-strategy eplb: both decide how to rebalance; leave one of the two out"
        )


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
    model.routed_experts_weights_of_layer = LazyValue(lambda: {layer.layer_id: _slot_tensors(layer) for layer in experts})


def _slot_tensors(layer: Any) -> list[Any]:
    from sglang.srt.layers.moe.utils import filter_moe_weight_param_global_expert

    slots = layer.num_local_experts
    return [p.data for name, p in layer.named_parameters() if name != "correction_bias" and filter_moe_weight_param_global_expert(name, p, slots)]


def warm_up(asked: settings.Settings) -> None:
    """Compile the planner while the model loads."""
    if not asked.plans:
        return
    from .. import eplb_table

    placement = asked.placement
    eplb_table.warm_up(placement.physical_to_logical, placement.num_logical_experts, placement.num_ranks)


@dataclass
class _Rebalance:
    """One rebalance of this rank, from the dump of the load to the last chunk of layers.

    Attributes:
        watchdog: around everything but the forward passes between two chunks.
        planner: ours, None where SGLang's own algorithm rebalances.
        moved: layers whose slots changed since they were last checked.
    """

    watchdog: Watchdog
    planner: Rebalancer | None
    moved: list[int] = field(default_factory=list)


def rebalance(original: Callable, self: Any) -> Iterator[None]:
    """`EPLBManager.rebalance`, a generator that lets forward passes run between two chunks of layers, watched and checked.

    Raises:
        PlacementError: on every rank alike, which ends the server, when a slot holds something else than its expert.
    """
    global _under_way
    asked = settings.current()
    model = self._get_model()
    policy = policy_from(asked.rebalance, REBALANCE_FLAG)
    if asked.plans and not hasattr(self, _PLANNER):
        setattr(self, _PLANNER, _planner(policy, model.routed_experts_weights_of_layer))
    here = _Rebalance(Watchdog(policy.watchdog, report=logger.warning), getattr(self, _PLANNER, None))
    steps = original(self)
    while True:
        _under_way = here
        try:
            with here.watchdog:
                here.watchdog.waits_for(WaitingFor("all-reduce of the load", peers=_others()))
                ended = next(steps, _END) is _END
                if here.moved and loaded.current() is not None:
                    here.watchdog.waits_for(WaitingFor("verification", tuple(here.moved), peers=_others()))
                    recheck(model, "expert weights were damaged by an exchange", here.moved)
        finally:
            _under_way = None
        if ended:
            return
        here.moved = []
        yield


def _planner(policy: RebalancePolicy, weights: Any) -> Rebalancer:
    layers = sorted(weights.keys())
    sizes = [sum(tensor[0].numel() * tensor.element_size() for tensor in weights[layer]) for layer in layers]
    return Rebalancer(policy, layers, sizes, logger, real_topology())


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
    planner = None if _under_way is None else _under_way.planner
    if planner is None:
        return original(tokens_per_expert, num_physical_experts, num_local_physical_experts, num_groups, num_nodes, algorithm)
    import torch
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    in_force = get_global_expert_location_metadata().physical_to_logical_map_cpu.numpy()
    rows = list(planner.layer_ids)
    counts = windows(tokens_per_expert.cpu().numpy()[:, rows])
    table = in_force.copy()
    if counts.any():
        ranks = num_physical_experts // num_local_physical_experts
        table[rows], _ = planner.propose(ExpertLoad(counts, planner.layer_ids), in_force[rows], ranks, num_groups or 1, num_nodes)
    to_physical, count = inverse_maps(table, tokens_per_expert.shape[-1])
    return torch.from_numpy(table.astype(np.int64)), torch.from_numpy(to_physical), torch.from_numpy(count)


def windows(counts: np.ndarray, most: int = MOST_WINDOWS) -> np.ndarray:
    """At most ``most`` windows of consecutive forward passes, without those that saw no token.

    Args:
        counts: ``[forward passes, layers, experts]``.

    Returns:
        float64 ``[windows, layers, experts]``.
    """
    served = counts[counts.any(axis=(1, 2))]
    first = np.linspace(0, len(served), min(most, len(served)) + 1).astype(int)[:-1]
    return np.add.reduceat(served, first, axis=0, dtype=np.float64) if len(first) else np.zeros((1, *counts.shape[1:]))


def update(
    original: Callable,
    self: Any,
    routed_experts_weights_of_layer: Any,
    new_expert_location_metadata: Any,
    update_layer_ids: Collection[int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`ExpertLocationUpdater.update` of the layers that change; the others cost neither a buffer nor a look at their experts."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    old, new = (m.physical_to_logical_map_cpu for m in (get_global_expert_location_metadata(), new_expert_location_metadata))
    changed = [layer for layer in update_layer_ids if not old[layer].equal(new[layer])]
    if not changed:
        return {}
    if _under_way is not None:
        _under_way.moved += changed
        _under_way.watchdog.waits_for(WaitingFor("transfers", tuple(changed), peers=_others()))
    return original(self, routed_experts_weights_of_layer, new_expert_location_metadata, changed, *args, **kwargs)


def _others() -> tuple[int, ...]:
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    group = get_moe_ep_group()
    return tuple(rank for rank in range(group.world_size) if rank != group.rank_in_group)


@lru_cache(maxsize=1)
def hooks() -> HookSet:
    """What a worker gets besides under a placement with ``--enable-eplb``; the same object in every call."""
    return HookSet(
        [
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
                relies_on=("tokens_per_expert", "num_physical_experts", "num_local_physical_experts", "num_groups", "num_nodes", "algorithm"),
                why="EPLB's algorithms are a closed list, never see the placement in force, and move experts whether it pays or not",
                upstream="SGLang #8345, #7879",
                removable_when="SGLang takes algorithms from plugins and hands them the placement in force",
            ),
            Hook(
                name="eplb-update",
                target="sglang.srt.eplb.expert_location_updater:ExpertLocationUpdater.update",
                hook=update,
                relies_on=("routed_experts_weights_of_layer", "new_expert_location_metadata", "update_layer_ids"),
                why="a layer whose placement stays is worked through all the same",
                removable_when="the updater passes over layers that do not change",
            ),
        ]
    )
