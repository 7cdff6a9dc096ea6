"""Take fingerprints of the experts that SGLang has loaded.

They tell which expert each slot should hold, and whether it does.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.events import count_event
from ...verification import verify as report
from ...verification.compare import ExpertDigests, RankDigests, check_experts, check_replicas
from ...verification.slots import expert_tensors
from ...verification.verify import Pass, gather, verify
from .layers import expert_layers

logger = logging.getLogger(__name__)

_EXPECTED = "_moe_placement_expected"
"""Attribute of the target model: digest of every expert of every layer.

It is None while they have to be taken anew.
"""

_WHOLE = "_moe_placement_whole"
"""Attribute of the target model whose weights have changed while serving.

It says whether the last change ended well here.
"""

_NO_WEIGHTS = frozenset(
    ("expert_mask_gpu", "expert_map", "e_score_correction_bias", "correction_bias")
)
_RESTART = (
    "Do not use the server's answers: restart it, and if it happens again report the model, the "
    "quantization and this message"
)


def check_map(metadata: Any) -> None:
    """Refuse tables that routing reads and that contradict the table of slots.

    They must say the same on the device and on the host. Routing goes by
    ``logical_to_all_physical_map`` or the rank's dispatch table, weights by
    ``physical_to_logical_map``.

    Args:
        metadata: SGLang's ``ExpertLocationMetadata``, slots ``[layers, physical experts]``.

    Raises:
        PlacementError: naming layer, expert and slot of the first contradiction.
    """
    held = _host(metadata.physical_to_logical_map)
    slots_of = _host(metadata.logical_to_all_physical_map)
    for name, table in (
        ("physical_to_logical_map", held),
        ("logical_to_all_physical_map", slots_of),
    ):
        wrong = np.argwhere(table != _host(getattr(metadata, f"{name}_cpu")))
        if wrong.size:
            raise PlacementError(
                f"layer {wrong[0][0]}: SGLang's {name} differs between device and host at "
                f"{wrong[0][1:].tolist()}. {_RESTART}"
            )
    dispatch = metadata.logical_to_rank_dispatch_physical_map
    for table in [slots_of, *([] if dispatch is None else [_host(dispatch)[..., None]])]:
        layers, experts, _ = np.indices(table.shape)
        wrong = np.argwhere((table >= 0) & (held[layers, np.maximum(table, 0)] != experts))
        if wrong.size:
            layer, expert, _ = at = tuple(wrong[0].tolist())
            raise PlacementError(
                f"layer {layer}: tokens of expert {expert} go to slot {table[at]}, which holds "
                f"expert {held[layer, table[at]]} by SGLang's own physical_to_logical_map. "
                f"{_RESTART}"
            )


def _host(table: Any) -> np.ndarray:
    return table.cpu().numpy()


def slot_experts(layer: Any, metadata: Any) -> np.ndarray:
    """Return the logical expert of each slot of this rank, int32 ``[slots]``.

    It is the expert by the placement in force, and -1 for a slot that holds none. Fused shared
    experts, which every rank holds, are numbered from the number of logical experts on.

    Args:
        layer: a ``FusedMoE``.
        metadata: SGLang's ``ExpertLocationMetadata``; None for a model without one, whose slots are
            its experts.
    """
    routed = layer._num_local_routed
    physical = np.arange(routed) + layer.moe_ep_rank * routed
    logical, experts = layer._num_global_routed, physical
    if metadata is not None:
        logical = metadata.num_logical_experts
        if layer.layer_id < metadata.num_layers:
            experts = _host(metadata.physical_to_logical_map)[layer.layer_id, physical]
        else:  # SGLang loads layers beyond the table by their own ids
            experts = np.where(physical < logical, physical, -1)
    return np.concatenate([experts, logical + np.arange(layer.num_fused_shared_experts)]).astype(
        np.int32
    )


def input_scales(layer: Any, experts: np.ndarray, logical: int) -> frozenset[str]:
    """Return the names of scales that are kept for all experts of the model on purpose.

    No slot gets another expert's of these. ModelOpt's NVFP4 keeps input scales so. Most kernels
    take the maximum of all; others cut a block by the trivial map, which is right while the slots
    of this rank follow it.

    Args:
        layer: a ``FusedMoE``.
        experts: logical expert of each slot of this rank.
        logical: experts of the model.
    """
    named = layer.named_parameters(recurse=False)
    kept = {name for name, p in named if getattr(p, "_sglang_require_global_experts", False)}
    if not kept:
        return frozenset()
    method, routed = layer.quant_method, layer._num_local_routed
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    backend = getattr(method, "_moe_runner_backend", None) or get_moe_runner_backend()
    reduced = (
        getattr(method, "enable_flashinfer_cutlass_moe", False)
        or getattr(method, "enable_flashinfer_trtllm_moe", False)
        or backend.is_marlin()
    )
    trivial = (np.arange(routed) + layer.moe_ep_rank * routed) % logical
    follows = bool((experts[:routed] == trivial).all())
    return frozenset(kept) if reduced or follows else frozenset()


def digest_model(model: Any, only: Collection[int] | None = None) -> Pass:
    """Take digests of every slot of this rank's MoE layers, read where the weights are.

    Args:
        model: the model.
        only: ids of the layers; None for all.

    Raises:
        PlacementError: for a layer whose tensors are not understood, or a placement that
            contradicts itself.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is not None:
        check_map(metadata)
    result = Pass()
    for name, layer in expert_layers(model).items():
        if only is not None and layer.layer_id not in only:
            continue
        every = {layer.num_experts, layer._num_global_routed}
        if metadata is not None:
            every |= {metadata.num_logical_experts, metadata.num_physical_experts}
        experts = slot_experts(layer, metadata)
        logical = layer._num_global_routed if metadata is None else metadata.num_logical_experts
        result.add(
            layer.layer_id,
            experts,
            expert_tensors(
                layer,
                experts.size,
                frozenset(every),
                _NO_WEIGHTS | input_scales(layer, experts, logical),
                name,
            ),
        )
    return result


def digest_ranks(model: Any, only: Collection[int] | None = None) -> tuple[Pass, list[RankDigests]]:
    """Take digests of this rank and of every EP rank that holds the same part of each expert.

    With fewer EP than TP ranks each expert is cut over the MoE-TP ranks; SGLang's MoE EP group has
    the ranks with the same part.

    Raises:
        PlacementError: on all of these ranks when one of them cannot make its digests.
    """
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    group = get_moe_ep_group()
    return report.digest_ranks(lambda: digest_model(model, only), group.cpu_group, group.world_size)


def _num_logical(model: Any) -> int:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    layers = expert_layers(model).values()
    return (
        max((layer._num_global_routed for layer in layers), default=0)
        if metadata is None
        else metadata.num_logical_experts
    )


def verify_loaded(model: Any, clean: ExpertDigests | None) -> None:
    """Check a model that was just loaded, and keep its experts' digests for later.

    All EP ranks check it together.

    Args:
        model: the target model.
        clean: digests of a clean load; None checks replicas only.

    Raises:
        PlacementError: which stops the server.
    """
    mine, ranks = digest_ranks(model)
    expected = verify(mine, ranks, _num_logical(model), clean, logger) if mine.layers else {}
    object.__setattr__(model, _EXPECTED, expected)
    count_event("verified_slots", mine.num_slots)


def weights_change(model: Any) -> None:
    """Forget what was known of the old weights: new ones are about to come."""
    object.__setattr__(model, _WHOLE, False)
    if hasattr(model, _EXPECTED):
        object.__setattr__(model, _EXPECTED, None)


def weights_are_whole(model: Any) -> bool:
    """Tell whether the last change of weights, if there was any, ended well on this rank."""
    return getattr(model, _WHOLE, True)


def weights_changed(model: Any, succeeded: bool) -> None:
    """Note that the new weights are there, all of them or not."""
    object.__setattr__(model, _WHOLE, succeeded)


def digests_known(model: Any) -> bool:
    """Tell whether there are digests of what is served."""
    return getattr(model, _EXPECTED, None) is not None


def renew(model: Any) -> bool:
    """Take digests anew of weights that were updated while serving; do nothing if none changed.

    All EP ranks must call it together, between two batches. Replicas must agree, as after loading.

    Returns:
        Whether the experts can be checked: not after an update that failed on some rank, until the
        next one.

    Raises:
        PlacementError: when replicas of an expert differ.
    """
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    if digests_known(model):
        return True
    group = get_moe_ep_group()
    if not all(gather(weights_are_whole(model), group.cpu_group, group.world_size)):
        logger.warning(
            "moe_placement_plugin: the last update of weights failed or released them: experts "
            "are not verified until they are updated again"
        )
        return False
    verify_loaded(model, None)
    return True


def recheck(
    model: Any,
    what: str = "expert weights have changed since the model was loaded",
    only: Collection[int] | None = None,
    alone: bool = False,
) -> None:
    """Check a serving worker's experts against what they were when the model was loaded.

    All TP ranks must call it together, between two batches: ``POST /weights_checker`` with the
    action `loaded.ACTION` does.

    Args:
        model: the target model, on which `verify_loaded` was called.
        what: beginning of the message when they differ.
        only: ids of the layers; None for all.
        alone: this rank by itself, where others may be dead; every rank knows every expert's
            digest.

    Raises:
        PlacementError: on every rank alike (alone: on the rank that is wrong), naming layer, slot,
            expert and rank.
    """
    from sglang.srt.distributed.parallel_state import (
        get_moe_ep_group,
        get_moe_tp_group,
        get_tp_group,
    )

    if alone:
        if not digests_known(model):
            raise PlacementError(
                "weights were updated while serving: with --elastic-ep-backend, where ranks may "
                "be dead, experts are not verified after that"
            )
        mine = digest_model(model, only)
        expected = {
            layer: digests
            for layer, digests in getattr(model, _EXPECTED).items()
            if only is None or layer in only
        }
        check_experts(
            expected, [mine.layers], what, _RESTART, first_rank=get_moe_ep_group().rank_in_group
        )
        count_event("verified_slots", mine.num_slots)
        logger.info(
            "moe_placement_plugin: verified %d slots of this rank again in %.3f s",
            mine.num_slots,
            mine.seconds,
        )
        return
    verdict = ""
    try:
        if not digests_known(model) and not renew(model):
            raise PlacementError(
                "the last update of weights failed, or they were released: update them again"
            )
        mine, ranks = digest_ranks(model, only)
        expected = {
            layer: digests
            for layer, digests in getattr(model, _EXPECTED).items()
            if only is None or layer in only
        }
        check_experts(expected, ranks, what, _RESTART)
        check_replicas(ranks, _num_logical(model) if mine.layers else 0)
        count_event("verified_slots", mine.num_slots)
        logger.info(
            "moe_placement_plugin: verified %d slots again in %.3f s", mine.num_slots, mine.seconds
        )
    except PlacementError as error:
        count_event("verify_failures")
        part = get_moe_tp_group()
        verdict = (
            f"MoE-TP rank {part.rank_in_group}: {error}" if part.world_size > 1 else str(error)
        )
    group = get_tp_group()
    verdicts: list[Any] = gather(verdict, group.cpu_group, group.world_size)
    if any(verdicts):
        raise PlacementError(next(filter(None, verdicts)))
