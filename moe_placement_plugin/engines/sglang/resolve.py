"""Turn SGLang's arguments into the settings of every process, or into one clear error.

The launcher does so in four steps: `flags.read_request`, `check_support`, `make_placement`,
`settings_for`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape, model_shape
from ...core.placement import Placement
from ...formats.packed import pack
from ...hosts.watch import DEFAULT_TIMEOUT, check_timeout
from ...planner.options import LOCALITIES
from ...recording.recorder import DEFAULT_INTERVAL, check_interval, check_path
from ...verification.level import check_level
from ..common import options
from ..common.request import Request
from ..common.settings import (
    HostSettings,
    LoadingSettings,
    PlacementSettings,
    RebalancingSettings,
    RecordingSettings,
    Settings,
    VerificationSettings,
)
from . import compat, direct, drafts, patches
from .combination import Combination, combination_of, location_shape
from .slots import Slots, place
from .support import (
    EPLB_RULES,
    RECORDING_RULES,
    VERIFICATION_RULES,
    check,
    check_placement,
)

logger = logging.getLogger(__name__)


def resolve(server_args: Any, request: Request) -> Settings:
    """Make the settings of a server from its resolved ``ServerArgs``, which are set to match.

    Raises:
        PlacementError: when what was asked for cannot be had.
    """
    combination = combination_of(server_args, request)
    shape = _shape(server_args)
    ranks = combination.ep_size
    padding = -(shape.num_experts + combination.redundant) % ranks if request.places else 0
    padded = replace(combination, redundant=combination.redundant + padding)
    verification = check_support(server_args, request, padded, shape)
    made = _NOTHING
    if request.places:
        made = make_placement(server_args, request, padded, shape, padding)
        compat.decide(server_args, **_arguments(padded, request))
    settings = settings_for(server_args, request, padded, verification, made)
    patches.require_fit(settings)
    if request.places:
        _report(settings, shape, combination.redundant)
    return settings


def check_support(
    server_args: Any, request: Request, combination: Combination, shape: ModelShape
) -> VerificationSettings:
    """Refuse what does not go together, and settle how far weights are verified.

    Args:
        server_args: SGLang's, resolved.
        request: what the user asked for.
        combination: what the engine is started with, padding among the redundant experts.
        shape: the model's MoE layers.

    Raises:
        PlacementError: naming the combination, the reason and the mend.
    """
    if request.places:
        _check_ranks(request, combination.ep_size)
        check_placement(combination)
        location = location_shape(compat.model_config(server_args))
        if location.num_logical_experts != shape.num_experts:
            raise PlacementError(
                f"{shape.name}: its config names {shape.num_experts} experts, SGLang counts "
                f"{location.num_logical_experts}: this model is not understood; serve it without "
                "the placement flags"
            )
        _check_rebalance(request, combination)
        _check_hosts(server_args, request, combination)
    verification = _verification(request, combination)
    if verification.on:
        named = replace(combination, level=verification.level)
        check(VERIFICATION_RULES, named, f"{options.VERIFY.flag} {verification.level}")
    if request.record is not None:
        check_path(request.record, (len(shape.layer_ids), shape.num_experts))
        check(RECORDING_RULES, combination, f"{options.RECORD.flag} {request.record}")
    return verification


@dataclass(frozen=True)
class Made:
    """Hold what came of making a placement on this host.

    Attributes:
        plan: None for the head's.
        padding: redundant experts that were added so that the slots divide over the ranks.
        adopts: this host waits for the head's.
        error: why it could not be made here, which the workers tell the other hosts.
    """

    plan: Placement | None = None
    padding: int = 0
    adopts: bool = False
    error: str | None = None


_NOTHING = Made()


def make_placement(
    server_args: Any,
    request: Request,
    combination: Combination,
    shape: ModelShape,
    padding: int,
) -> Made:
    """Make the placement, or note why another host has to say what becomes of it.

    Raises:
        PlacementError: when it cannot be had on any host.
    """
    cfg = compat.resolved(server_args)
    nodes, moves = _nodes(cfg), "enable_eplb" in combination.options
    if nodes > 1 and int(cfg.node_rank) > 0 and request.waits_for_head(moves):
        return Made(padding=padding, adopts=True)
    try:
        slots = Slots(combination.ep_size, nodes, combination.redundant - padding, padding)
        plan = place(request, shape, slots, moves)
        drafts.check_rows(plan, request, cfg, shape)
        pack(plan)  # it must fit on the way to the workers
        return Made(plan, padding)
    except PlacementError as refused:
        if nodes == 1 or not request.needs_file:
            raise
        # The other hosts would wait for this one: its workers tell them, and all stop.
        logger.error("%s", refused)
        return Made(padding=padding, error=str(refused))


def settings_for(
    server_args: Any,
    request: Request,
    combination: Combination,
    verification: VerificationSettings,
    made: Made,
) -> Settings:
    """Put together what every process must know."""
    cfg = compat.resolved(server_args)
    nodes, moves = _nodes(cfg), request.places and "enable_eplb" in combination.options
    placement = hosts = recording = None
    if request.places:
        placement = PlacementSettings(
            request.strategy,
            made.plan,
            request.file or "",
            request.file is not None,
            combination.redundant,
            made.padding,
        )
    if request.places and nodes > 1:
        timeout = DEFAULT_TIMEOUT if request.host_timeout is None else request.host_timeout
        hosts = HostSettings(timeout, nodes, made.adopts, made.error)
    if request.record is not None:
        interval = check_interval(request.interval or DEFAULT_INTERVAL)
        recording = RecordingSettings(request.record, interval, request.coactivation)
    elastic = moves and "elastic_ep_backend" in combination.options
    return Settings(
        placement,
        verification,
        recording,
        RebalancingSettings(moves, request.plans, request.rebalance, elastic),
        hosts,
        LoadingSettings(
            reads=combination.load_format != "dummy",
            stages=combination.pp_size,
            direct=request.places and direct.allowed(combination),
        ),
        combination.ep_size,
    )


def _shape(server_args: Any) -> ModelShape:
    config = compat.model_config(server_args)
    text_config = getattr(config, "hf_text_config", None) or config.hf_config
    return model_shape(text_config, str(compat.resolved(server_args).model_path))


def _nodes(cfg: Any) -> int:
    return int(getattr(cfg, "nnodes", 1) or 1)


def _check_ranks(request: Request, ranks: int) -> None:
    if ranks < 2:
        raise PlacementError(
            f"{options.STRATEGY.flag} {request.strategy} with --ep-size {ranks}: one rank holds "
            "every expert, there is nothing to place; add --ep-size (at most --tp-size), or leave "
            "the placement flags out"
        )


def _check_rebalance(request: Request, combination: Combination) -> None:
    moves = "enable_eplb" in combination.options
    if request.rebalance is not None:
        from ...rebalancing.rebalancer import policy_from  # lazy: numba

        if not (moves and request.plans):
            raise PlacementError(
                f"{options.REBALANCE.flag} without --enable-eplb and {options.STRATEGY.flag} eplb: "
                "nothing of ours rebalances; add both, or leave it out"
            )
        policy_from(request.rebalance, options.REBALANCE.flag)
    if request.planner and not moves:
        raise PlacementError(
            "--eplb-algorithm expert_placement without --enable-eplb: nothing rebalances; add it, "
            "or leave the algorithm out"
        )
    if moves:
        check(EPLB_RULES, combination, "--enable-eplb with an expert placement")


def _check_hosts(server_args: Any, request: Request, combination: Combination) -> None:
    if request.host_timeout is not None:
        if _nodes(compat.resolved(server_args)) == 1:
            raise PlacementError(
                f"{options.HOST_TIMEOUT.flag} {request.host_timeout:g} with --nnodes 1: there is "
                "no other host; leave it out"
            )
        check_timeout(request.host_timeout, options.HOST_TIMEOUT.flag)
    locality = request.locality or "none"
    if locality not in LOCALITIES:
        raise PlacementError(
            f"{options.LOCALITY.flag} {locality}: choose one of {', '.join(LOCALITIES)}"
        )
    if locality != "none" and "enable_eplb" in combination.options:
        raise PlacementError(
            f"{options.LOCALITY.flag} {locality} with --enable-eplb, which has its own rule for "
            "groups and nodes: leave it out"
        )


def _verification(request: Request, combination: Combination) -> VerificationSettings:
    """Settle the level; every slot of a dummy model is random by itself, replicas too."""
    level = check_level(request.verify, request.places)
    if request.verify is None and combination.load_format == "dummy" and combination.redundant:
        level = "off"
    return VerificationSettings(level, request.verify is not None)


def _arguments(combination: Combination, request: Request) -> dict[str, Any]:
    """Choose SGLang's own arguments as the placement needs them."""
    values: dict[str, Any] = {"ep_num_redundant_experts": combination.redundant}
    if combination.a2a_backend == "none":
        # All ranks see all tokens, so they must agree on the replica. With one replica each a plain
        # look-up does; "dynamic" picks by token row.
        if request.dispatch is None or combination.redundant == 0:
            values["ep_dispatch_algorithm"] = "dynamic" if combination.redundant else "static"
    # The ids of fused shared experts lie beyond the routed slots: a draft, whose routing knows no
    # slots, and redundant experts shift them.
    values["disable_shared_experts_fusion"] = True
    return values


def _report(settings: Settings, shape: ModelShape, wanted: int) -> None:
    placement = settings.placement
    assert placement is not None, "only of a server with a placement"
    plan = placement.plan
    if plan is None:
        if settings.adopts:
            logger.info(
                "expert placement %s: this host has no file, the head's placement holds",
                placement.strategy,
            )
        return
    if placement.padding:
        logger.warning(
            "%d experts%s do not divide over %d ranks: %d redundant slots per layer are added so "
            "that SGLang can start (--ep-num-redundant-experts %d)",
            shape.num_experts,
            f" and {wanted} redundant ones" if wanted else "",
            plan.num_ranks,
            placement.padding,
            wanted + placement.padding,
        )
    logger.info(
        "expert placement %s: %d MoE layers, %d experts in %d slots on %d ranks",
        plan.strategy,
        plan.num_layers,
        plan.num_logical_experts,
        plan.num_slots,
        plan.num_ranks,
    )
