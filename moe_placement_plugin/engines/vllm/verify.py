"""Fingerprints of the experts that vLLM has loaded: ``--expert-placement-verify``."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

from ...errors import PlacementError
from ...fingerprint.compare import ExpertDigests, RankDigests, check_experts, expert_digests
from ...fingerprint.report import RESTORE, Pass, digest_ranks, verify
from ...fingerprint.slots import expert_tensors
from ..load_recorder import count_event
from .layers import num_logical, routed_layers, slot_experts
from .settings import KEY, layer_id_of

logger = logging.getLogger("vllm.moe_placement_plugin")

_EXPECTED = "_moe_placement_expected"
_NO_WEIGHTS = frozenset(
    ("_expert_map", "expert_map", "expert_mask", "e_score_correction_bias", "expert_global_to_physical", "expert_physical_to_global",
     "expert_local_to_global")
)  # fmt: skip


def digest_model(model: Any) -> Pass:
    """Digests of every slot of this rank's MoE layers, read where the weights are.

    Raises:
        PlacementError: for a layer whose tensors are not understood.
    """
    result = Pass()
    for row, (name, layer) in enumerate(routed_layers(model).items()):
        experts = slot_experts(layer)
        every = frozenset((num_logical(layer), layer.expert_map_manager.global_num_experts))
        ignore = _NO_WEIGHTS
        if getattr(layer.quant_method, "use_global_sf", False):
            # Activation scales of all experts, which the kernel reduces to one before it reads them.
            ignore |= {"w13_input_scale", "w2_input_scale"}
        tensors = expert_tensors(layer, experts.size, every, ignore, name)
        result.add(_number(row, name), experts, tensors)
    return result


def _digest_ranks(model: Any) -> tuple[Pass, list[RankDigests]]:
    from vllm.distributed import parallel_state

    group = parallel_state.get_ep_group()
    return digest_ranks(lambda: digest_model(model), group.cpu_group, group.world_size)


def clean_load(load: Callable, loader: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any) -> ExpertDigests:
    """Load the model with vLLM's own placement and without our patches, digest its experts, and drop it again.

    Nothing else is in memory yet, so that the peak is that of one model.

    Args:
        load: vLLM's own ``BaseModelLoader.load_model``; the rest are its arguments.
    """
    clean = copy.copy(vllm_config)
    clean.additional_config = {key: value for key, value in (vllm_config.additional_config or {}).items() if key != KEY}
    clean.parallel_config = copy.copy(vllm_config.parallel_config)
    clean.parallel_config.expert_placement_strategy = "linear"
    clean.parallel_config.enable_ep_weight_filter = False
    clean.parallel_config.enable_eplb = False
    clean.parallel_config.eplb_config = copy.copy(vllm_config.parallel_config.eplb_config)
    clean.parallel_config.eplb_config.num_redundant_experts = 0
    # Layers register themselves here by name; those of the model that is dropped must not stay.
    clean.compilation_config = copy.copy(vllm_config.compilation_config)
    for name, value in vars(clean.compilation_config).items():
        if isinstance(value, (dict, list, set)):
            setattr(clean.compilation_config, name, copy.copy(value))
    model = load(loader, clean, model_config, *args, **kwargs)
    found = expert_digests(_digest_ranks(model)[1])
    del model
    gc.collect()
    import torch

    torch.accelerator.empty_cache()
    return found


def verify_loaded(model: Any, clean: ExpertDigests | None) -> None:
    """Check a model that was just loaded, on all EP ranks together, and keep its experts' digests for later.

    Raises:
        WeightsMismatch: on every rank alike, which stops the engine.
    """
    layers = routed_layers(model)
    if not layers:
        return
    mine, ranks = _digest_ranks(model)
    expected = verify(mine, ranks, max(map(num_logical, layers.values())), clean, logger)
    for row, (name, layer) in enumerate(layers.items()):
        number = _number(row, name)
        object.__setattr__(layer, _EXPECTED, (number, expected[number]))
    count_event("verified_slots", mine.num_slots)


def _number(row: int, name: str) -> int:
    layer_id = layer_id_of(name)
    # A draft model's layers have no number of their own.
    return -1 - row if layer_id is None else layer_id


def is_verified(model: Any) -> bool:
    """Whether the model's experts were digested when it was loaded."""
    return any(hasattr(layer, _EXPECTED) for layer in routed_layers(model).values())


def check_again(model: Any, what: str) -> int:
    """Check the experts against what they were when the model was loaded; all EP ranks together.

    Args:
        model: the model, or the part of it that EPLB knows.
        what: beginning of the message for a mismatch.

    Returns:
        Slots of this rank that were verified.

    Raises:
        WeightsMismatch: on every rank alike, naming layer, slot, expert and rank.
    """
    expected = dict(getattr(layer, _EXPECTED) for layer in routed_layers(model).values())
    mine, ranks = _digest_ranks(model)
    try:
        check_experts(expected, ranks, what, RESTORE)
    except PlacementError:
        count_event("verify_failures")
        raise
    count_event("verified_slots", mine.num_slots)
    return mine.num_slots


def recheck(worker: Any) -> int:
    """`check_again` for a worker that serves: ``llm.collective_rpc(recheck)``.

    Raises:
        WeightsMismatch: naming layer, slot, expert and rank.
        PlacementError: when nothing was verified at start-up.
    """
    model = worker.model_runner.model
    if not is_verified(model):
        raise PlacementError("nothing to compare with: the server was started with --expert-placement-verify off")
    return check_again(model, "expert weights have changed while serving")
