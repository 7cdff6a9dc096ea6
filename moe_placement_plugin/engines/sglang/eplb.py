"""Watch and check SGLang's EPLB (``--enable-eplb``), with our planner and exchange under it.

SGLang's manager and recorder do what they do; they are told less often to move experts, and
watched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from ...core.errors import PlacementError
from ...exchange.watchdog import Watchdog
from ...rebalancing import tables
from ...rebalancing.rebalance import Rebalance, other_ranks
from ..common.settings import Settings
from . import (
    elastic,
    eplb_counting,
    eplb_exchange,
    eplb_phases,
    eplb_policy,
    expert_reader,
)
from .hook_registry import Hook
from .layers import expert_layers
from .slot_digests import digests_known, recheck, renew
from .state import placing, verifies

logger = logging.getLogger(__name__)

_END = object()


def list_weights(model: Any) -> None:
    """Tell SGLang's EPLB what to move in a model that does not list it.

    Stock SGLang serves such a model until the first rebalance.

    Raises:
        PlacementError: for a model with other experts in the same tensors.
    """
    # Whoever looks into a list before the first rebalance fixes its tensors, so it is only asked
    # for.
    if getattr(model, "routed_experts_weights_of_layer", None) is not None:
        return
    from sglang.srt.utils import LazyValue

    experts = list(expert_layers(model).values())
    if any(layer.num_fused_shared_experts for layer in experts):
        raise PlacementError(
            f"--enable-eplb: {type(model).__name__} keeps shared experts among the routed ones, "
            "which EPLB cannot move: add --disable-shared-experts-fusion, or leave --enable-eplb "
            "out"
        )
    model.routed_experts_weights_of_layer = LazyValue(
        lambda: {layer.layer_id: eplb_exchange.slot_tensors(layer) for layer in experts}
    )


def warm_up(settings: Settings) -> None:
    """Compile planner and exchange while the model loads."""
    placement = settings.plan
    assert placement is not None, "settled before a model loads"
    tables.warm_up(
        placement.physical_to_logical,
        placement.num_logical_experts,
        placement.num_ranks,
        settings.rebalancing.plans,
    )


def _can_verify(model: Any) -> bool:
    """Tell whether what moves can be verified.

    Digests of weights that were updated while serving are taken first.

    Raises:
        PlacementError: when replicas of an updated expert differ.
    """
    if not verifies():
        return False
    if elastic.may_lose_ranks():  # some may be dead: no collective
        return digests_known(model)
    return renew(model)


def rebalance(original: Callable, self: Any) -> Iterator[None]:
    """Watch and check `EPLBManager.rebalance`, which serves between two chunks of layers.

    Args:
        original: a generator, which yields where forward passes are to run.
        self: SGLang's manager.

    Raises:
        PlacementError: on every rank alike, which ends the server, when a slot holds something else
            than its expert.
    """
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    settings, eplb = placing(), eplb_exchange.loaded()
    assert settings is not None, "hooked only where a placement was asked for"
    model = self._get_model()
    if settings.rebalancing.plans and eplb.rebalancer is None:
        weights = model.routed_experts_weights_of_layer
        eplb.rebalancer = eplb_policy.rebalancer_of(eplb, weights)
    here = Rebalance(
        Watchdog(eplb.policy.watchdog, report=logger.warning),
        other_ranks(get_moe_ep_group()),
        eplb.rebalancer,
    )
    steps = original(self)
    while True:
        eplb.rebalance = here
        try:
            with here.watchdog:
                can_verify = _can_verify(model)
                here.waits_for("all-reduce of the load")
                ended = next(steps, _END) is _END
                if here.moved and can_verify:
                    here.waits_for("verification", here.moved)
                    recheck(
                        model,
                        "expert weights were damaged by an exchange",
                        here.moved,
                        elastic.may_lose_ranks(),
                    )
        finally:
            eplb.rebalance = None
        if ended:
            return
        here.moved = []
        yield


def is_needed(original: Callable, self: Any, *args: Any, **kwargs: Any) -> bool:
    """Answer `EPLBManager._check_rebalance_needed`: always yes after a rank has died."""
    return elastic.live_ranks() is not None or original(self, *args, **kwargs)


def eplb_hooks() -> list[Hook]:
    """Return what a worker gets besides with ``--enable-eplb``."""
    return [
        *_rebalance_hooks(),
        *eplb_exchange.exchange_hooks(),
        *eplb_phases.phase_hooks(),
        *eplb_counting.count_hooks(),
        _needed_hook(),
        *expert_reader.name_hooks(),
    ]


def _rebalance_hooks() -> list[Hook]:
    """Return the hooks on SGLang's manager and on what it asks for a plan."""
    return [
        Hook(
            name="eplb-rebalance",
            target="sglang.srt.eplb.eplb_manager:EPLBManager.rebalance",
            hook=rebalance,
            relies_on=("self",),
            why="an exchange that hangs, or leaves a slot with the wrong weights, is never "
            "reported",
            upstream="SGLang #39580",
            removable_when="never: it is this plugin's own check",
        ),
        Hook(
            name="eplb-plan",
            target="sglang.srt.eplb.eplb_algorithms:rebalance_experts",
            hook=eplb_policy.plan,
            relies_on=(
                "tokens_per_expert",
                "num_physical_experts",
                "num_local_physical_experts",
                "num_groups",
                "num_nodes",
                "algorithm",
            ),
            why="EPLB's algorithms are a closed list, never see the placement in force, and move "
            "experts whether it pays or not",
            upstream="SGLang #8345, #7879",
            removable_when="SGLang takes algorithms from plugins and hands them the placement in "
            "force",
        ),
    ]


def _needed_hook() -> Hook:
    return Hook(
        name="eplb-needed",
        target="sglang.srt.eplb.eplb_manager:EPLBManager._check_rebalance_needed",
        hook=is_needed,
        relies_on=("self",),
        why="with --eplb-min-rebalancing-utilization-threshold a server whose ranks have died may "
        "not place their experts anew",
        removable_when="the threshold is not asked after a rank fault",
        optional=True,
    )
