"""After loading: the placement is in force in every layer, and the weights are where it says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ..common.patching import LOADING, PLACEMENT, Patch, hits_of
from ..common.settings import Settings
from .drafts import check_draft, draft_layer_id, is_draft, loading, refuse_own_kind
from .eplb_support import check_draft_supported, check_supported, refusing_unsupported
from .evidence import EVIDENCE, check_evidence
from .expert_maps import expert_map, knows
from .hosts import check_adoption
from .kernels import check_experts
from .layers import layer_id_of, num_logical, routed_layers
from .reload import serve, updates_of
from .reload_core import core_patches
from .reload_worker import reload_patches
from .stacked import follow
from .state import settings_of
from .verification import clean_load, verify_loaded

logger = logging.getLogger("vllm.moe_placement_plugin")


def _load_model(original):
    def load_model(self, vllm_config, model_config, *args, **kwargs):
        settings = settings_of(vllm_config)
        if settings is None:
            return original(self, vllm_config, model_config, *args, **kwargs)
        check_adoption(settings)
        level = settings.verification.level
        # The draft of speculative decoding comes through here too, some with a config in which it is the model.
        draft = is_draft(vllm_config, model_config)
        main = not draft and model_config is vllm_config.model_config
        eplb = settings.rebalancing.moves
        moves = eplb and main and (settings.plan is not None or settings.rebalancing.plans)
        named = moves or (draft and eplb)
        with refusing_unsupported(model_config.architecture) if named else nullcontext():
            clean = (
                clean_load(original, settings, self, vllm_config, model_config, *args, **kwargs)
                if level == "checkpoint"
                else None
            )
            with loading(draft), _followed(self) if settings.places else nullcontext():
                model = original(self, vllm_config, model_config, *args, **kwargs)
        load_format = self.load_config.load_format
        if str(getattr(load_format, "value", load_format)) == "dummy":
            for layer in routed_layers(model).values():
                vars(layer).pop(EVIDENCE, None)
        if draft and settings.static is not None and not routed_layers(model):
            refuse_own_kind(model, int(model_config.get_num_experts() or 0))
        stages = vllm_config.parallel_config.pipeline_parallel_size if main else 1
        if moves:
            check_supported(model)
        elif draft and eplb:
            check_draft_supported(model)
        _report(routed_layers(model), settings, main, stages, draft)
        serve(model)
        if level != "off":
            if main and stages == 1 and settings.verification.asked and not routed_layers(model):
                raise PlacementError(
                    f"--expert-placement-verify {level}: {type(model).__name__} has no MoE layer of vLLM's own kind: leave the flag out"
                )
            verify_loaded(model, clean, settings)
        return model

    return load_model


@contextmanager
def _followed(loader: Any) -> Iterator[None]:
    """Every model that this loader loads weights into meanwhile is given them through `stacked.follow`."""
    original = loader.load_weights

    def load_weights(model, *args, **kwargs):
        follow(model)
        return original(model, *args, **kwargs)

    loader.load_weights = load_weights
    try:
        yield
    finally:
        del loader.load_weights


def _worker_load_model(original):
    def load_model(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        settings, runner = settings_of(self.vllm_config), self.model_runner
        model = runner.get_model() if hasattr(runner, "get_model") else runner.model
        if settings is not None and settings.places and updates_of(model) is None:
            raise PlacementError(
                f"--load-format {self.vllm_config.load_config.load_format} loaded {type(model).__name__} in a way of its own, past vLLM's "
                "BaseModelLoader.load_model: nothing shows that experts are where the placement says; use --load-format auto, or leave "
                "the placement flag out"
            )
        return result

    return load_model


def _report(
    layers: dict[str, Any],
    settings: Settings,
    main: bool,
    stages: int = 1,
    draft: bool = False,
) -> None:
    """Check the loaded layers against the plan once more and log one line per process.

    Args:
        layers: name -> ``RoutedExperts`` of the model, or the pipeline stage of it, that was loaded.
        settings: the engine's settings.
        main: whether it is the model that the placement is for, and no draft.
        stages: pipeline stages, which are checked together.
        draft: whether they are the layers of a draft.

    Raises:
        PlacementError: when the placement is not in force.
    """
    plan = settings.plan
    if plan is not None and main:
        found = {name: (layer_id_of(name), num_logical(layer)) for name, layer in layers.items()}
        _check_coverage(found if stages == 1 else _of_all_stages(found), settings)
    if draft:
        check_draft(layers, settings)
    if not layers:
        return
    rank = ranks = None
    for name, layer in layers.items():
        manager = layer.expert_map_manager
        rank, ranks = manager.ep_rank, manager.ep_size
        check_evidence(layer)
        if settings.static is None or ranks == 1:
            continue
        use_tables = manager.moe_parallel_config.needs_round_robin_routing_tables
        check_experts(layer.quant_method, use_tables, name)
        number = draft_layer_id(name) if draft else layer_id_of(name)
        expected = expert_map(settings, number, manager.global_num_experts, ranks, rank, draft)
        if not np.array_equal(manager.expert_map[: expected.size].cpu().numpy(), expected):
            raise PlacementError(
                f"{name}: the expert map in force on EP rank {rank} is not the plan's: another plugin or a changed vLLM replaced "
                "it; remove that plugin or the placement flag"
            )
    hits = ", ".join(
        f"{name} {count}" for name, count in hits_of(PLACEMENT, LOADING).items() if count
    )
    digest = "engine's own" if plan is None else f"{plan.digest[:12]} ({plan.strategy})"
    logger.info(
        "moe_placement_plugin: %s on EP rank %s/%s, %d MoE layers, placement %s; patch hits: %s",
        settings.strategy, rank, ranks, len(layers), digest, hits,
    )  # fmt: skip


Found = dict[str, tuple[int | None, int]]
"""Name of an MoE layer -> (its number, logical experts)."""


def _of_all_stages(found: Found) -> Found:
    """What the pipeline stages have loaded together; each of them then finds the same faults and stops with the same reason."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    parts: list[Any] = [None] * group.world_size
    dist.all_gather_object(parts, found, group=group.cpu_group)
    return {name: layer for part in parts for name, layer in part.items()}


def _check_coverage(found: Found, settings: Settings) -> None:
    """Refuse a model whose MoE layers are not those that the placement is for."""
    if not found:
        raise PlacementError(
            "the model that was loaded has no MoE layer of vLLM's own kind, so that no expert was placed: serve it without the "
            "placement flag"
        )
    plan = settings.plan
    if plan is None or settings.placement is None or not settings.placement.exact:
        return
    for name, (layer_id, experts) in found.items():
        if not knows(plan, layer_id, experts):
            raise PlacementError(
                f"{name} is not in the plan (layers {plan.layer_ids[0]}..{plan.layer_ids[-1]}): plan for this model"
            )
    held = sorted({layer_id for layer_id, _ in found.values() if layer_id is not None})
    missing = set(plan.layer_ids) - set(held)
    if missing:
        raise PlacementError(
            f"the plan has layer {min(missing)}, the model that was loaded has MoE layers {held}: plan for this model"
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
        Patch(
            "load-seen",
            "vllm.v1.worker.gpu_worker:Worker.load_model",
            _worker_load_model,
            why="a loader with a load_model of its own (out-of-tree ones) goes past the check of what was loaded",
            removable_when="never: it is this plugin's own check",
        ),
        *core_patches(),
        *reload_patches(),
    ]
