"""After loading: the placement is in force in every layer, and the weights are where it says."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ...errors import PlacementError
from ..patching import Patch
from .drafts import check_draft, draft_layer_id, is_draft, loading
from .eplb import check_supported
from .filled import check_filled
from .hosts import check_adoption
from .kernels import check_experts
from .layers import num_logical, routed_layers
from .settings import PlacementSettings, layer_id_of, settings_of
from .verify import clean_load, verify_loaded

logger = logging.getLogger("vllm.moe_placement_plugin")


def _load_model(original):
    def load_model(self, vllm_config, model_config, *args, **kwargs):
        settings = settings_of(vllm_config)
        if settings is None:
            return original(self, vllm_config, model_config, *args, **kwargs)
        check_adoption(settings)
        level = settings["verify"]
        clean = (
            clean_load(original, settings, self, vllm_config, model_config, *args, **kwargs)
            if level == "checkpoint"
            else None
        )
        # The draft of speculative decoding comes through here too, some with a config in which it is the model.
        draft = is_draft(vllm_config, model_config)
        with loading(draft):
            model = original(self, vllm_config, model_config, *args, **kwargs)
        main = not draft and model_config is vllm_config.model_config
        whole = main and vllm_config.parallel_config.pipeline_parallel_size == 1
        if (
            settings["eplb"]
            and main
            and (settings.placement is not None or settings.strategy == "eplb")
        ):
            check_supported(model)
        _report(routed_layers(model), settings, whole, draft)
        if level != "off":
            if whole and settings["verify_asked"] and not routed_layers(model):
                raise PlacementError(
                    f"--expert-placement-verify {level}: {type(model).__name__} has no MoE layer of vLLM's own kind: leave the flag out"
                )
            verify_loaded(model, clean, settings)
        return model

    return load_model


def _report(
    layers: dict[str, Any], settings: PlacementSettings, whole: bool, draft: bool = False
) -> None:
    """Check the loaded layers against the plan once more and log one line per process.

    Args:
        layers: name -> ``RoutedExperts`` of the model that was loaded.
        settings: the engine's settings.
        whole: whether these are all layers of the model that the placement is for.
        draft: whether they are the layers of a draft.

    Raises:
        PlacementError: when the placement is not in force.
    """
    from .patches import load_set, patch_set

    plan = settings.placement
    if plan is not None and whole:
        _check_coverage(layers, settings)
    if draft:
        check_draft(layers, settings)
    if not layers:
        return
    rank = ranks = None
    for name, layer in layers.items():
        manager = layer.expert_map_manager
        rank, ranks = manager.ep_rank, manager.ep_size
        check_filled(layer)
        if settings.static is None or ranks == 1:
            continue
        use_tables = manager.moe_parallel_config.needs_round_robin_routing_tables
        check_experts(layer.quant_method, use_tables, name)
        number = draft_layer_id(name) if draft else layer_id_of(name)
        expected = settings.expert_map(number, manager.global_num_experts, ranks, rank, draft)
        if not np.array_equal(manager.expert_map[: expected.size].cpu().numpy(), expected):
            raise PlacementError(
                f"{name}: the expert map in force on EP rank {rank} is not the plan's: another plugin or a changed vLLM replaced "
                "it; remove that plugin or the placement flag"
            )
    hits = ", ".join(
        f"{name} {count}"
        for name, count in (patch_set().hits() | load_set().hits()).items()
        if count
    )
    digest = "engine's own" if plan is None else f"{plan.digest[:12]} ({plan.strategy})"
    logger.info(
        "moe_placement_plugin: %s on EP rank %s/%s, %d MoE layers, placement %s; patch hits: %s",
        settings.strategy, rank, ranks, len(layers), digest, hits,
    )  # fmt: skip


def _check_coverage(layers: dict[str, Any], settings: PlacementSettings) -> None:
    """Refuse a model whose MoE layers are not those that the placement is for."""
    if not layers:
        raise PlacementError(
            "the model that was loaded has no MoE layer of vLLM's own kind, so that no expert was placed: serve it without the "
            "placement flag"
        )
    if not settings["exact"]:
        return
    plan, found = settings.placement, {name: layer_id_of(name) for name in layers}
    for name, layer_id in found.items():
        if not settings.knows(layer_id, num_logical(layers[name])):
            raise PlacementError(
                f"{name} is not in the plan (layers {plan.layer_ids[0]}..{plan.layer_ids[-1]}): plan for this model"
            )
    missing = set(plan.layer_ids) - set(found.values())
    if missing:
        raise PlacementError(
            f"the plan has layer {min(missing)}, the model that was loaded has MoE layers {sorted(found.values())}: plan for this model"
        )


def load_patches() -> list[Patch]:
    """The patch that looks at every model that was loaded."""
    return [
        Patch(
            "load-report",
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
            _load_model,
            relies_on=("vllm_config", "model_config"),
            why="a patch that never ran in a worker process must not go unnoticed",
            removable_when="never: it is this plugin's own check",
        ),
    ]
