"""Make, in the launcher, the settings of every process from vLLM's arguments, or one clear error.

Four steps: `read_request`, `check_support`, `make_placement`, `settings_for`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape, model_shape
from ...core.placement import Placement
from ...core.topology import Topology
from ...hosts.watch import check_timeout
from ...planner.options import LOCALITIES
from ...strategies import ALIASES, get_strategy
from ...strategies.resolve import resolve_placement
from ...verification.level import check_level
from ..common import options
from ..common.request import Request, check_recording_flags, request_from
from ..common.settings import (
    LoadingSettings,
    PlacementSettings,
    RebalancingSettings,
    Settings,
    VerificationSettings,
)
from .combination import Combination, combination_of
from .drafts import draft_shape
from .hosts import host_settings, is_head, planned_topology, resolves_on_every_host, spans_hosts
from .recording import recording_settings
from .support import (
    PLACEMENT_RULES,
    RECORDING_RULES,
    SLOT_RULES,
    VERIFICATION_RULES,
    check,
)

logger = logging.getLogger("vllm.moe_placement_plugin")


def resolve(vllm_config: Any) -> Settings | None:
    """Make the settings of a server from its fresh ``VllmConfig``.

    The config's own strategy is set to match.

    Returns:
        None where nothing is asked of this plugin.

    Raises:
        PlacementError: when what was asked for cannot be had.
    """
    request = read_request(vllm_config)
    combination = combination_of(vllm_config)
    verification = check_support(vllm_config, request, combination)
    if not (request.places or verification.on or request.record or _needs_mending(combination)):
        return None
    made = make_placement(vllm_config, request, combination) if request.places else _NOTHING
    settings = settings_for(vllm_config, request, verification, made)
    parallel = vllm_config.parallel_config
    if settings.static is not None or (made.is_to_come and not combination.eplb):
        # A process in which the patches are missing refuses this value; "linear" it would serve.
        parallel.expert_placement_strategy = settings.strategy
    elif request.places:
        parallel.expert_placement_strategy = "linear"  # of EPLB's physical experts
    return settings


def read_request(vllm_config: Any) -> Request:
    """Read what the user asked for; flags without what they belong to are refused.

    Raises:
        PlacementError: naming the flag.
    """
    named = vllm_config.parallel_config.expert_placement_strategy
    strategy = ALIASES.get(named, named)
    extra = vllm_config.additional_config or {}
    places = strategy != "linear" or extra.get(options.FILE.name) is not None
    request = request_from(extra, strategy, named, places)
    check_recording_flags(request)
    if request.locality is not None and not places:
        raise PlacementError(
            f"{options.LOCALITY.flag} without a recorded load to plan from: add "
            f"{options.FILE.flag}, or leave it out"
        )
    return request


def check_support(
    vllm_config: Any, request: Request, combination: Combination
) -> VerificationSettings:
    """Refuse what does not go together, and settle how far weights are verified.

    Raises:
        PlacementError: naming the flag, the combination, the reason and the mend.
    """
    if request.record is not None:
        check(RECORDING_RULES, combination, f"{options.RECORD.flag} {request.record}")
    verification = _verification(request, combination)
    _check_rebalance(request, combination)
    _check_host_timeout(vllm_config, request, verification)
    if request.places:
        check(PLACEMENT_RULES, combination, request.flag)
        _check_locality(vllm_config, request)
    if verification.on:
        check(VERIFICATION_RULES, combination, f"{options.VERIFY.flag} {verification.level}")
    return verification


@dataclass(frozen=True)
class Made:
    """Hold what came of making a placement on this host.

    Attributes:
        plan: None for the engine's own, for the head's, or where EPLB begins by itself.
        adopts: this host waits for the head's.
        error: why it could not be made here, which the workers tell the other hosts.
    """

    plan: Placement | None = None
    adopts: bool = False
    error: str | None = None

    @property
    def is_to_come(self) -> bool:
        """Tell whether the other hosts decide what becomes of this one."""
        return self.adopts or self.error is not None


_NOTHING = Made()


def make_placement(vllm_config: Any, request: Request, combination: Combination) -> Made:
    """Make the placement, or note why another host has to say what becomes of it.

    Raises:
        PlacementError: when it cannot be had on any host.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    everywhere = resolves_on_every_host(parallel)
    shape = model_shape(model.hf_text_config, model.model, model.get_num_experts())
    if everywhere and not is_head(parallel) and request.waits_for_head(combination.eplb):
        return Made(adopts=True)
    try:
        if combination.eplb:
            return Made(_first_placement(request, shape, combination.ep_size, parallel))
        plan = resolve_placement(
            request.named,
            request.file,
            replace(shape, draft=draft_shape(vllm_config)),
            planned_topology(parallel, combination.ep_size),
            locality=request.locality or "none",
        )
        check(SLOT_RULES, replace(combination, even=plan.is_even), request.flag)
        return Made(plan)
    except PlacementError as refused:
        if not everywhere or not request.needs_file:
            raise
        # The other hosts would wait for this one: its workers tell them, and all stop.
        logger.error("moe_placement_plugin: %s", refused)
        return Made(error=str(refused))


def settings_for(
    vllm_config: Any, request: Request, verification: VerificationSettings, made: Made
) -> Settings:
    """Put together what every process must know."""
    parallel = vllm_config.parallel_config
    moves = bool(parallel.enable_eplb and (request.places or verification.on))
    strategy = request.strategy
    if request.places and strategy == "linear":  # the flag's default: a file decides
        strategy = "eplb"
    placement = PlacementSettings(
        strategy,
        made.plan,
        request.file or "",
        exact=request.file is not None,
        redundant=parallel.eplb_config.num_redundant_experts if moves else 0,
    )
    hosts = None
    if request.places or verification.on:
        hosts = host_settings(parallel, request, made.adopts, made.error)
    return Settings(
        placement if request.places or moves else None,
        verification,
        recording_settings(vllm_config, request),
        RebalancingSettings(moves, moves and strategy == "eplb", request.rebalance),
        hosts,
        LoadingSettings(
            lora=request.places and getattr(vllm_config, "lora_config", None) is not None
        ),
        combination_of(vllm_config).ep_size,
    )


def _needs_mending(combination: Combination) -> bool:
    """Decide whether vLLM's CPU build needs our patches to run expert parallelism at all."""
    from vllm.platforms import current_platform

    used = combination.ep_size > 1 and combination.expert_parallel and combination.is_moe
    return used and current_platform.is_cpu()


def _verification(request: Request, combination: Combination) -> VerificationSettings:
    """Settle the level of verification.

    Dummy weights, which differ from replica to replica, have none by default.
    """
    level = check_level(request.verify, request.places)
    if combination.load_format == "dummy" and request.verify is None:
        level = "off"
    return VerificationSettings(level, request.verify is not None)


def _check_rebalance(request: Request, combination: Combination) -> None:
    if request.rebalance is None:
        return
    from ...rebalancing.rebalancer import policy_from  # lazy: heavy

    plans = request.strategy in ("eplb", "linear")
    if not (request.places and combination.eplb and plans):
        raise PlacementError(
            f"{options.REBALANCE.flag} without --enable-eplb and {options.STRATEGY.flag} eplb: "
            "nothing rebalances; add both, or leave it out"
        )
    policy_from(request.rebalance, options.REBALANCE.flag)


def _check_host_timeout(
    vllm_config: Any, request: Request, verification: VerificationSettings
) -> None:
    if request.host_timeout is None:
        return
    used = request.places or verification.on
    if not (used and spans_hosts(vllm_config.parallel_config)):
        raise PlacementError(
            f"{options.HOST_TIMEOUT.flag} {request.host_timeout} without a placement on several "
            "hosts (--nnodes, Ray, data parallel hosts): leave it out"
        )
    check_timeout(request.host_timeout, options.HOST_TIMEOUT.flag)


def _check_locality(vllm_config: Any, request: Request) -> None:
    value, parallel = request.locality, vllm_config.parallel_config
    if value is None or value == "none":
        return
    flag = f"{options.LOCALITY.flag} {value}"
    if value not in LOCALITIES:
        raise PlacementError(f"{flag}: choose one of {', '.join(LOCALITIES)}")
    if parallel.use_ray:
        raise PlacementError(
            f"{flag} with Ray, which decides where ranks lie after the placement is made: make a "
            f"plan with `moe-placement plan --nodes N --locality {value}` and give that, or use "
            "--nnodes"
        )
    if parallel.enable_eplb:
        raise PlacementError(
            f"{flag} with --enable-eplb, which has its own rule for groups and nodes: leave it out"
        )


def _first_placement(
    request: Request, shape: ModelShape, ep_size: int, parallel: Any
) -> Placement | None:
    """Make the placement that EPLB begins with.

    Returns:
        None leaves strategy eplb, which plans from what EPLB records, vLLM's own beginning.
    """
    redundant = parallel.eplb_config.num_redundant_experts
    slots = shape.num_experts + redundant
    if slots % ep_size:
        raise PlacementError(
            f"{shape.num_experts} experts and {redundant} redundant ones do not divide over "
            f"{ep_size} EP ranks, as EPLB needs: use --eplb-config.num_redundant_experts "
            f"{redundant + -slots % ep_size}"
        )
    if request.file is None and get_strategy(request.named).needs_load:
        return None
    return resolve_placement(
        request.named,
        request.file,
        shape,
        Topology(ep_size),
        redundant,
        (slots // ep_size,) * ep_size,
    )
