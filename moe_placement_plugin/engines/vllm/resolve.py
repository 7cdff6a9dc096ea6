"""Checks before any process loads the model, and the placement that comes out of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape, model_shape
from ...core.placement import Placement
from ...core.topology import Topology
from ...hosts.watch import check_timeout
from ...strategies import ALIASES, get_strategy
from ...strategies.base import LOCALITIES
from ...strategies.resolve import resolve_placement
from ...verification.level import check_level
from ..common.host_flags import LOCALITY_FLAG, TIMEOUT_FLAG
from .carrier import put_into_force
from .detect import FILE_KEY, HOST_TIMEOUT_KEY, LOCALITY_KEY, REBALANCE_KEY, VERIFY_KEY
from .drafts import draft_shape
from .hosts import host_settings, is_head, planned_topology, resolves_on_every_host, spans_hosts
from .recording import record_settings
from .settings import KEY, PlacementSettings
from .support import ALL2ALL_WITH_TABLES, check_all2all, check_moe_backend
from .weight_transfer import check_backend

logger = logging.getLogger("vllm.moe_placement_plugin")

_LOADERS_OF_THEIR_OWN = (
    "tensorizer",
    "ipc_cache",
    "modelexpress",
    "sharded_state",
    "runai_streamer_sharded",
)

EXPERTS_OF_THEIR_OWN = (
    "MiniCPMForCausalLM",
    "MiniCPM3ForCausalLM",
    "HfMoondream",
    "Moondream3ForCausalLM",
)
"""Architectures whose experts are no ``RoutedExperts`` of vLLM's: they number and load them by themselves."""

SUPPORTED = ("0.25", "0.34")
"""First supported version of vLLM and the first that is not."""


def check_version() -> None:
    """Refuse a vLLM outside the supported range.

    Raises:
        PlacementError: naming the version found.
    """
    # importlib.metadata knows the CPU build under another name, the module always knows its own.
    import vllm

    first, end = SUPPORTED
    try:
        version = Version(vllm.__version__)
    except InvalidVersion:
        version = None
    if version is None or not Version(first) <= Version(version.base_version) < Version(end):
        raise PlacementError(
            f"vLLM {vllm.__version__} is outside the supported range {first} to {end} (exclusive): install a vLLM in that range, "
            "or leave --expert-placement-strategy out"
        )


def ep_size_of(parallel: Any) -> int:
    """EP ranks of a ``ParallelConfig``: vLLM spreads experts over all of TP, DP and prefill context parallelism."""
    return (
        parallel.tensor_parallel_size
        * parallel.data_parallel_size
        * getattr(parallel, "prefill_context_parallel_size", 1)
    )


def resolve(vllm_config: Any) -> Any:
    """Check a fresh ``VllmConfig`` and put the `PlacementSettings` into it.

    Returns:
        The same config.

    Raises:
        PlacementError: when the placement that was asked for cannot be had.
    """
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    asked = parallel.expert_placement_strategy
    strategy = ALIASES.get(asked, asked)
    extra = dict(vllm_config.additional_config or {})
    file = extra.get(FILE_KEY)
    explicit = strategy != "linear" or file is not None
    flag = (
        f"--expert-placement-strategy {asked}"
        if file is None
        else f"--expert-placement-file {file}"
    )
    model = vllm_config.model_config
    ep_size = ep_size_of(parallel)
    record = record_settings(vllm_config)
    verify = _level(extra.get(VERIFY_KEY), explicit, vllm_config.load_config.load_format)
    eplb = bool(parallel.enable_eplb and (explicit or verify != "off"))
    rebalance = _rebalance(
        extra.get(REBALANCE_KEY), explicit and eplb and strategy in ("eplb", "linear")
    )
    timeout = _host_timeout(extra.get(HOST_TIMEOUT_KEY), parallel, explicit or verify != "off")
    if explicit:
        _check(vllm_config, model, parallel, ep_size, flag)
    elif extra.get(LOCALITY_KEY) is not None:
        raise PlacementError(
            f"{LOCALITY_FLAG} without a recorded load to plan from: add --expert-placement-file, or leave it out"
        )
    if verify != "off":
        _check_verify(vllm_config, parallel, verify)
    elif (
        not explicit
        and record is None
        and (
            ep_size == 1
            or not parallel.enable_expert_parallel
            or not model.is_moe
            or not current_platform.is_cpu()
        )
    ):
        return vllm_config
    placement, error = None, None
    adopt = (
        explicit
        and resolves_on_every_host(parallel)
        and not is_head(parallel)
        and _waits_for_head(asked, file, eplb)
    )
    if explicit:
        shape = model_shape(model.hf_text_config, model.model, model.get_num_experts())
        locality = _locality(extra.get(LOCALITY_KEY), parallel)
        try:
            if not adopt:
                placement = _place(vllm_config, asked, file, shape, ep_size, locality)
        except PlacementError as refused:
            if not resolves_on_every_host(parallel) or (
                file is None and not get_strategy(asked).needs_load
            ):
                raise
            # The other hosts would wait for this one: its workers tell them, and all stop with the reason.
            logger.error("moe_placement_plugin: %s", refused)
            error = str(refused)
        # linear is the flag's default: with a file it means that the file decides.
        strategy = "eplb" if strategy == "linear" else strategy
    settings = PlacementSettings.make(
        strategy, placement, ep_size, record, exact=file is not None, verify=verify, eplb=eplb, rebalance=rebalance,
        verify_asked=extra.get(VERIFY_KEY) is not None,
        hosts=host_settings(parallel, timeout, file, adopt, error) if explicit or verify != "off" else None,
        redundant=parallel.eplb_config.num_redundant_experts if eplb else 0,
        lora=explicit and getattr(vllm_config, "lora_config", None) is not None,
    )  # fmt: skip
    if settings.static is not None or ((adopt or error is not None) and not eplb):
        # A process in which the patches are missing refuses this value; "linear" it would serve.
        parallel.expert_placement_strategy = strategy
    elif explicit:
        parallel.expert_placement_strategy = "linear"  # of EPLB's physical experts
    vllm_config.additional_config = {**extra, KEY: put_into_force(settings)}
    return vllm_config


def _check(vllm_config: Any, model: Any, parallel: Any, ep_size: int, flag: str) -> None:
    if not model.is_moe:
        raise PlacementError(
            f"{flag}: {model.model} is no Mixture-of-Experts model: it has no experts to place; leave the flag out"
        )
    if model.architecture in EXPERTS_OF_THEIR_OWN:
        raise PlacementError(
            f"{flag}: vLLM's {model.architecture} holds its experts outside vLLM's MoE layer, where none can be placed; leave the flag out"
        )
    if not parallel.enable_expert_parallel:
        raise PlacementError(
            f"{flag} without --enable-expert-parallel: without expert parallelism every rank holds a part of every expert and "
            "there is nothing to place; add --enable-expert-parallel"
        )
    if ep_size == 1:
        raise PlacementError(
            f"{flag} with one EP rank (tensor and data parallel size 1): all experts lie on that rank; add "
            "--tensor-parallel-size or --data-parallel-size, or leave the flag out"
        )
    if vllm_config.load_config.load_format in _LOADERS_OF_THEIR_OWN:
        raise PlacementError(
            f"{flag} together with --load-format {vllm_config.load_config.load_format}: it puts weights where they were when they were "
            "saved, past the map of experts; use --load-format auto"
        )
    check_backend(vllm_config, flag)
    if getattr(parallel, "enable_elastic_ep", False):
        raise PlacementError(
            f"{flag} together with --enable-elastic-ep: a static placement holds for a fixed number of ranks; leave one of the two out"
        )
    if (
        not parallel.enable_eplb
    ):  # EPLB sends tokens to slots by itself, through kernels that vLLM has checked
        check_moe_backend(
            getattr(getattr(vllm_config, "kernel_config", None), "moe_backend", "auto"),
            _uses_all2all(parallel) and parallel.all2all_backend in ALL2ALL_WITH_TABLES,
        )


def _rebalance(values: Any, used: bool) -> dict[str, Any] | None:
    if values is None:
        return None
    from ...rebalancing.rebalancer import REBALANCE_FLAG, policy_from  # lazy: heavy

    if not used:
        raise PlacementError(
            f"{REBALANCE_FLAG} without --enable-eplb and --expert-placement-strategy eplb: nothing rebalances; add both, or leave it out"
        )
    policy_from(values, REBALANCE_FLAG)
    return dict(values)


def _waits_for_head(asked: str, file: Any, eplb: bool) -> bool:
    """Whether this host, which is not the head, lacks the file that the placement comes from."""
    if file is not None:
        return not Path(file).exists()
    return get_strategy(asked).needs_load and not eplb


def _host_timeout(value: Any, parallel: Any, used: bool) -> float | None:
    if value is None:
        return None
    if not (used and spans_hosts(parallel)):
        raise PlacementError(
            f"{TIMEOUT_FLAG} {value} without a placement on several hosts (--nnodes, Ray, data parallel hosts): leave it out"
        )
    return check_timeout(value, TIMEOUT_FLAG)


def _locality(value: str | None, parallel: Any) -> str:
    if value is None or value == "none":
        return "none"
    if value not in LOCALITIES:
        raise PlacementError(f"{LOCALITY_FLAG} {value}: choose one of {', '.join(LOCALITIES)}")
    if parallel.use_ray:
        raise PlacementError(
            f"{LOCALITY_FLAG} {value} with Ray, which decides where ranks lie after the placement is made: make a plan with `moe-placement plan "
            f"--nodes N --locality {value}` and give that, or use --nnodes"
        )
    if parallel.enable_eplb:
        raise PlacementError(
            f"{LOCALITY_FLAG} {value} with --enable-eplb, which has its own rule for groups and nodes: leave it out"
        )
    return value


def _place(
    vllm_config: Any, asked: str, file: Any, shape: ModelShape, ep_size: int, locality: str
) -> Placement | None:
    parallel = vllm_config.parallel_config
    if parallel.enable_eplb:
        return _first_placement(
            asked, file, shape, ep_size, parallel.eplb_config.num_redundant_experts
        )
    placement = resolve_placement(
        asked,
        file,
        replace(shape, draft=draft_shape(vllm_config)),
        planned_topology(parallel, ep_size),
        locality=locality,
    )
    _check_back_ends(vllm_config, parallel, placement)
    return placement


def _first_placement(
    asked: str, file: Any, shape: ModelShape, ep_size: int, redundant: int
) -> Placement | None:
    """Where EPLB begins; None leaves its own beginning to strategy eplb, which plans from what EPLB records."""
    slots = shape.num_experts + redundant
    if slots % ep_size:
        raise PlacementError(
            f"{shape.num_experts} experts and {redundant} redundant ones do not divide over {ep_size} EP ranks, as EPLB needs: use "
            f"--eplb-config.num_redundant_experts {redundant + -slots % ep_size}"
        )
    if file is None and get_strategy(asked).needs_load:
        return None
    return resolve_placement(
        asked,
        file,
        shape,
        Topology(ep_size),
        redundant,
        (slots // ep_size,) * ep_size,
    )


def _level(value: str | None, placed: bool, load_format: Any) -> str:
    """How far weights are verified; dummy weights, which differ from replica to replica, are not."""
    level = check_level(value, placed)
    if str(getattr(load_format, "value", load_format)) == "dummy" and level != "off":
        if value is not None:
            raise PlacementError(
                f"--expert-placement-verify {level} with --load-format dummy: weights are random, replicas of an expert differ; leave one "
                "of the two out"
            )
        return "off"
    return level


def _check_verify(vllm_config: Any, parallel: Any, level: str) -> None:
    if not (parallel.enable_expert_parallel and vllm_config.model_config.is_moe):
        raise PlacementError(
            f"--expert-placement-verify {level} without --enable-expert-parallel and a Mixture-of-Experts model: no rank holds whole "
            "experts; add --enable-expert-parallel, or leave the flag out"
        )
    if getattr(parallel, "enable_elastic_ep", False):
        raise PlacementError(
            f"--expert-placement-verify {level} together with --enable-elastic-ep: ranks come and go and cannot check each other; leave one "
            "of the two out"
        )


def _uses_all2all(parallel: Any) -> bool:
    return (
        parallel.data_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        or bool(getattr(parallel, "use_sequence_parallel_moe", False))
    )


def _check_back_ends(vllm_config: Any, parallel: Any, placement: Placement) -> None:
    if _uses_all2all(parallel) or parallel.all2all_backend == "passthrough":
        check_all2all(parallel.all2all_backend, placement.is_even)
