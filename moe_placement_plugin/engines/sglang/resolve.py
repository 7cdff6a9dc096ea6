"""From the flags to a placement, in the launcher, once SGLang's own arguments are resolved."""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape, model_shape
from ...core.placement import Placement
from ...core.topology import Topology
from ...formats.packed import pack
from ...formats.plan_or_load import read
from ...strategies import get_strategy
from ...strategies.resolve import check_plan, resolve_placement
from . import compat, direct, drafts, eplb, hosts, reload
from .settings import Settings
from .support import OPTIONS, Combination, check

logger = logging.getLogger(__name__)


def finish(server_args: Any, asked: Settings) -> None:
    """Resolve the placement that ``server_args`` asks for and set SGLang's own arguments to match.

    Raises:
        PlacementError: when the request cannot be honoured.
    """
    if asked.placement is not None or asked.adopts or asked.error is not None:
        return
    import sglang

    cfg = compat.resolved(server_args)
    ranks = int(cfg.ep_size)
    if ranks < 2:
        raise PlacementError(
            f"--expert-placement-strategy {asked.strategy} with --ep-size {ranks}: one rank holds every expert, there is "
            "nothing to place; add --ep-size (at most --tp-size), or leave the placement flags out"
        )
    config = compat.model_config(server_args)
    architecture = _architecture(config)
    name = str(cfg.model_path)
    text_config = getattr(config, "hf_text_config", None) or config.hf_config
    shape = model_shape(text_config, name)
    location = location_shape(config)
    wanted = int(cfg.ep_num_redundant_experts)
    padding = -(shape.num_experts + wanted) % ranks
    options = {o for o in OPTIONS if getattr(cfg, o, None)}
    if str(getattr(cfg, "weight_cache_mode", None) or "off") != "off":
        options.add("weight_cache_mode")
    if "sglang.srt.ray.engine" in sys.modules:  # newer versions have no flag for it
        options.add("use_ray")
    if _has_amx_kernels():
        options.add("cpu_amx")
    combination = Combination(
        version=sglang.__version__,
        architecture=architecture,
        has_location=location is not None,
        redundant=wanted + padding,
        device=str(cfg.device).split(":")[0],
        a2a_backend=str(cfg.moe_a2a_backend or "none"),
        runner_backend=str(cfg.moe_runner_backend or "auto"),
        quantization=_quantization(cfg, config),
        dispatch=asked.dispatch_algorithm or "",
        load_format=_load_format(cfg),
        options=frozenset(options),
    )
    check(combination)
    if location.num_logical_experts != shape.num_experts:
        raise PlacementError(
            f"{name}: its config names {shape.num_experts} experts, SGLang counts {location.num_logical_experts}: this model "
            "is not understood; serve it without the placement flags"
        )
    from .patches import hooks  # lazy: numba

    differences = hooks().check() + reload.hooks().check()
    differences += eplb.hooks().check() if cfg.enable_eplb else []
    if differences:
        raise PlacementError(
            f"SGLang {sglang.__version__} differs from what this plugin was written for: {'; '.join(differences)}. Use a "
            "supported version or leave the placement flags out"
        )
    eplb.settle(asked, cfg)
    hosts.settle(asked, cfg)
    if not asked.adopts:
        try:
            placement = place(asked, shape, ranks, asked.nodes, wanted, padding)
            drafts.check_rows(placement, asked, cfg, shape)
            pack(placement)  # it must fit on the way to the workers
            asked.placement = placement
        except PlacementError as refused:
            if asked.nodes == 1 or (
                asked.file is None and not get_strategy(asked.strategy).needs_load
            ):
                raise
            # The other hosts would wait for this one: its workers tell them, and all stop with the reason.
            logger.error("%s", refused)
            asked.error = str(refused)
    asked.padding = padding
    asked.direct = direct.allowed(combination)
    asked.reads = combination.load_format != "dummy"
    asked.stages = int(cfg.pp_size)
    compat.decide(server_args, **_arguments(combination, asked))
    _report(asked, shape, wanted)


def location_shape(model_config: Any) -> Any:
    """SGLang's ``ModelConfigForExpertLocation`` of the model, None when its class has none."""
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation

    return ModelConfigForExpertLocation.from_model_config(model_config)


def _architecture(model_config: Any) -> str:
    """The class that SGLang will build, which is another than ``config.json`` names with ``--model-impl transformers``."""
    from sglang.srt.model_loader import get_model_architecture

    return get_model_architecture(model_config)[1]


def _has_amx_kernels() -> bool:
    from sglang.srt.utils import cpu_has_amx_support

    return bool(cpu_has_amx_support())


def _load_format(cfg: Any) -> str:
    return str(getattr(cfg.load_format, "value", cfg.load_format))


def _quantization(cfg: Any, config: Any) -> str:
    """The quantization that SGLang will load by, empty for none.

    Its ``ModelConfig`` reads what ``config.json`` does not say (``hf_quant_config.json`` of ModelOpt's checkpoints).

    Args:
        cfg: SGLang's resolved arguments.
        config: SGLang's ``ModelConfig``.
    """
    own = getattr(config, "quantization", None)
    return str(own or cfg.quantization or _checkpoint_quantization(config.hf_config))


def _checkpoint_quantization(hf_config: Any) -> str:
    quantization = getattr(hf_config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = getattr(quantization, "to_dict", dict)()
    return str(quantization.get("quant_method", "") or "")


def place(
    asked: Settings, shape: ModelShape, ranks: int, nodes: int, wanted: int, padding: int
) -> Placement:
    """The placement, with the equal number of slots on every rank that SGLang needs.

    Args:
        asked: the flags.
        shape: the model's MoE layers.
        ranks: EP ranks.
        nodes: hosts that they are spread over.
        wanted: redundant experts that the user asked for.
        padding: further ones, so that the slots divide over the ranks.

    Raises:
        PlacementError: when the request cannot be honoured.
    """
    topology = Topology.even(ranks, nodes) if ranks % nodes == 0 else Topology.even(ranks)
    redundant = wanted + padding
    per_rank = ((shape.num_experts + redundant) // ranks,) * ranks
    if asked.file is not None:
        plan = read(asked.file, ranks, shape.num_experts)
        if isinstance(plan, Placement):
            if plan.num_redundant == wanted and padding and plan.num_ranks == ranks:
                plan = fill_up(plan, per_rank[0])
            _check_slots(plan, shape, ranks, wanted, padding, asked.file)
            if asked.locality == "none":  # else resolve_placement refuses
                return check_plan(plan, shape, topology, redundant, per_rank, asked.file)
    elif (
        asked.moves and asked.strategy == "eplb"
    ):  # which plans from what EPLB records, beginning where EPLB does
        row = np.arange(shape.num_experts + redundant) % shape.num_experts
        return Placement(
            np.tile(row, (len(shape.layer_ids), 1)),
            shape.num_experts,
            per_rank,
            shape.layer_ids,
            "eplb",
        )
    return resolve_placement(
        asked.strategy, asked.file, shape, topology, redundant, per_rank, asked.locality
    )


def _check_slots(
    plan: Placement, shape: ModelShape, ranks: int, wanted: int, padding: int, file: str
) -> None:
    """Say in SGLang's own terms when a plan's slots do not fit ``--ep-num-redundant-experts``."""
    fits = plan.num_logical_experts == shape.num_experts and plan.num_ranks == ranks
    if fits and plan.num_redundant != wanted + padding:
        padded = f" (and {padding} to fill the ranks up)" if padding else ""
        raise PlacementError(
            f"{file} is a plan with {plan.num_redundant} redundant experts per layer, the server has "
            f"--ep-num-redundant-experts {wanted}{padded}: start it with --ep-num-redundant-experts {plan.num_redundant}, or "
            f"plan with {wanted + padding}"
        )


def fill_up(plan: Placement, slots: int) -> Placement:
    """``plan`` with further replicas on the ranks that have fewer than ``slots`` slots.

    A plan of an engine with uneven ranks (vLLM) keeps every expert where it is; a short rank also gets the experts with
    the fewest copies that it does not hold yet, lowest id first.
    """
    if max(plan.slots_per_rank) > slots:
        return plan
    table = np.empty((plan.num_layers, slots * plan.num_ranks), dtype=np.int32)
    for row in range(plan.num_layers):
        held = [plan.local_experts(row, rank).tolist() for rank in range(plan.num_ranks)]
        copies = plan.replica_counts[row].copy()
        for local in held:
            while len(local) < slots:
                expert = min(
                    (e for e in range(plan.num_logical_experts) if e not in local),
                    key=lambda e: (copies[e], e),
                )
                copies[expert] += 1
                local.append(expert)
        table[row] = np.concatenate(held)
    return Placement(
        table,
        plan.num_logical_experts,
        (slots,) * plan.num_ranks,
        plan.layer_ids,
        plan.strategy,
        plan.metadata,
        plan.draft,
    )


def _arguments(combination: Combination, asked: Settings) -> dict[str, Any]:
    """SGLang's own arguments as the placement needs them."""
    values: dict[str, Any] = {"ep_num_redundant_experts": combination.redundant}
    if combination.a2a_backend == "none":
        # All ranks see all tokens, so they must agree on the replica. With one replica each a plain look-up does; "dynamic"
        # picks by token row.
        if asked.dispatch_algorithm is None or combination.redundant == 0:
            values["ep_dispatch_algorithm"] = "dynamic" if combination.redundant else "static"
    # The ids of fused shared experts lie beyond the routed slots: a draft, whose routing knows no slots, and redundant
    # experts shift them.
    values["disable_shared_experts_fusion"] = True
    return values


def _report(asked: Settings, shape: ModelShape, wanted: int) -> None:
    placement = asked.placement
    if placement is None:
        if asked.adopts:
            logger.info(
                "expert placement %s: this host has no file, the head's placement holds",
                asked.strategy,
            )
        return
    if asked.padding:
        logger.warning(
            "%d experts%s do not divide over %d ranks: %d redundant slots per layer are added so that SGLang can start "
            "(--ep-num-redundant-experts %d)",
            shape.num_experts,
            f" and {wanted} redundant ones" if wanted else "",
            placement.num_ranks,
            asked.padding,
            wanted + asked.padding,
        )
    logger.info(
        "expert placement %s: %d MoE layers, %d experts in %d slots on %d ranks",
        placement.strategy,
        placement.num_layers,
        placement.num_logical_experts,
        placement.num_slots,
        placement.num_ranks,
    )
