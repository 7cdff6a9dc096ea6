"""Fingerprints of the experts that vLLM has loaded: ``--expert-placement-verify``."""

from __future__ import annotations

import copy
import gc
import logging
import re
from collections.abc import Callable, Collection
from typing import Any

from ...core.errors import PlacementError
from ...core.events import count_event
from ...verification.compare import ExpertDigests, RankDigests, check_experts, expert_digests
from ...verification.slots import Unverifiable, expert_tensors
from ...verification.verify import RESTORE, Pass, digest_ranks, verify
from ..common.settings import Settings
from .layers import EXPECTED, num_logical, numbered, routed_layers, slot_experts
from .state import KEY, STATE

logger = logging.getLogger("vllm.moe_placement_plugin")

_NO_WEIGHTS = frozenset(
    ("_expert_map", "expert_map", "expert_mask", "e_score_correction_bias", "expert_global_to_physical", "expert_physical_to_global",
     "expert_local_to_global")
)  # fmt: skip


# Per slot, but from a maximum over experts: over all of them under EPLB, over the rank's own without (and in vLLM 0.25 always).
_REDUCED = re.compile(r"(input_scale|alphas?|gscale|weight_scale_2)$")


def digest_model(
    model: Any, settings: Settings | None = None, only: Collection[int] | None = None
) -> Pass:
    """Digests of every slot of this rank's MoE layers, read where the weights are.

    Args:
        model: a loaded model.
        settings: the engine's settings; None reads every layer or fails.
        only: numbers of the layers (`numbered`); None for all.

    Raises:
        PlacementError: for a layer whose tensors are not understood, if the user asked for the level by name.
    """
    result = Pass()
    layers = routed_layers(model)
    for name, number in numbered(layers).items():
        if only is not None and number not in only:
            continue
        layer = layers[name]
        experts = slot_experts(layer)
        every = frozenset((num_logical(layer), layer.expert_map_manager.global_num_experts))
        ignore = _NO_WEIGHTS
        if getattr(layer.quant_method, "use_global_sf", False):
            # Activation scales of all experts, which the kernel reduces to one before it reads them.
            ignore |= {"w13_input_scale", "w2_input_scale"}
        try:
            tensors = expert_tensors(layer, experts.size, every, ignore, name)
        except Unverifiable as error:
            if settings is None or settings.verification.asked:
                raise
            logger.warning("moe_placement_plugin: %s is not verified: %s", name, error)
            continue
        if settings is not None and settings.rebalancing.moves:
            tensors = {key: tensor for key, tensor in tensors.items() if not _REDUCED.search(key)}
        result.add(number, experts, tensors)
    return result


def _digest_ranks(model: Any, settings: Settings) -> tuple[Pass, list[RankDigests]]:
    from vllm.distributed import parallel_state

    group = parallel_state.get_ep_group()
    return digest_ranks(lambda: digest_model(model, settings), group.cpu_group, group.world_size)


def clean_load(
    load: Callable,
    settings: Settings,
    loader: Any,
    vllm_config: Any,
    model_config: Any,
    *args: Any,
    **kwargs: Any,
) -> ExpertDigests:
    """Load the model with vLLM's own placement and without our patches, digest its experts, and drop it again.

    Nothing else is in memory yet, so that the peak is that of one model.

    Args:
        load: vLLM's own ``BaseModelLoader.load_model``; what follows the settings are its arguments.
        settings: the engine's settings.
    """
    clean = copy.copy(vllm_config)
    clean.additional_config = {
        key: value for key, value in (vllm_config.additional_config or {}).items() if key != KEY
    }
    clean.parallel_config = copy.copy(vllm_config.parallel_config)
    clean.parallel_config.expert_placement_strategy = "linear"
    clean.parallel_config.enable_ep_weight_filter = False
    clean.parallel_config.enable_eplb = False
    clean.parallel_config.eplb_config = copy.copy(vllm_config.parallel_config.eplb_config)
    clean.parallel_config.eplb_config.num_redundant_experts = 0
    # Building a model renames what its quantisation leaves out, and a second time would rename it again.
    clean.quant_config = copy.deepcopy(vllm_config.quant_config)
    # Layers register themselves here by name; those of the model that is dropped must not stay.
    clean.compilation_config = copy.copy(vllm_config.compilation_config)
    for name, value in vars(clean.compilation_config).items():
        if isinstance(value, (dict, list, set)):
            setattr(clean.compilation_config, name, copy.copy(value))
    model = load(loader, clean, model_config, *args, **kwargs)
    found = expert_digests(_digest_ranks(model, settings)[1])
    del model
    gc.collect()
    import torch

    torch.accelerator.empty_cache()
    return found


def verify_loaded(model: Any, clean: ExpertDigests | None, settings: Settings) -> None:
    """Check a model that was just loaded, on all EP ranks together, and keep its experts' digests for later.

    Raises:
        WeightsMismatch: on every rank alike, which stops the engine.
    """
    layers = routed_layers(model)
    if not layers:
        return
    mine, ranks = _digest_ranks(model, settings)
    numbers = numbered(layers)
    expected = verify(
        mine,
        ranks,
        {numbers[name]: num_logical(layer) for name, layer in layers.items()},
        clean,
        logger,
    )
    for name, layer in layers.items():
        if numbers[name] in expected:
            object.__setattr__(layer, EXPECTED, (numbers[name], expected[numbers[name]]))
    count_event("verified_slots", mine.num_slots)


def is_verified(model: Any) -> bool:
    """Whether the model's experts were digested when it was loaded."""
    return any(hasattr(layer, EXPECTED) for layer in routed_layers(model).values())


def check_again(
    model: Any,
    what: str,
    rows: Collection[int] | None = None,
) -> int:
    """Check this rank's experts against what they were when the model was loaded.

    Every rank knows every expert's digest, so that it checks itself and waits for no other: ranks of different data parallel
    engines meet only in forward passes.

    Args:
        model: the model, or the part of it that EPLB knows.
        what: beginning of the message for a mismatch.
        rows: which of the model's MoE layers, counted from 0 in its order; None for all.

    Returns:
        Slots of this rank that were verified.

    Raises:
        WeightsMismatch: naming layer, slot, expert and rank; it ends this worker, and with it the engine.
    """
    layers = list(routed_layers(model).values())
    chosen = layers if rows is None else [layers[row] for row in rows]
    expected = dict(getattr(layer, EXPECTED) for layer in chosen if hasattr(layer, EXPECTED))
    rank = layers[0].expert_map_manager.ep_rank
    mine = digest_model(model, STATE.settings, expected.keys())
    try:
        check_experts(expected, [mine.layers], what, RESTORE, first_rank=rank)
    except PlacementError:
        count_event("verify_failures")
        raise
    count_event("verified_slots", mine.num_slots)
    return mine.num_slots


def recheck(worker: Any) -> int:
    """`check_again` for a worker that serves: ``llm.collective_rpc(recheck)``.

    Raises:
        WeightsMismatch: naming layer, slot, expert and rank.
        PlacementError: when nothing was verified at start-up, or weights were updated since.
    """
    model = worker.model_runner.model
    if not is_verified(model):
        raise PlacementError(
            "nothing to compare with: the server was started with --expert-placement-verify off, or its weights were updated since"
        )
    return check_again(model, "expert weights have changed while serving")
