"""Build MoE layers with the placement's slots, and prove that all were filled.

The proof comes after loading: every slot was filled through the map.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from ...core.errors import PlacementError
from ...core.placement import Placement
from ..common.patching import PLACEMENT, hits_of
from . import direct, draft_layers, drafts, evidence, expert_reader, positional
from .hook_registry import Hook
from .layers import check_router, moe_blocks
from .routing import LAYER
from .state import STATE, placing, plan_here

_FUSED_MOE = "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE"

logger = logging.getLogger(__name__)


def build(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """Run `FusedMoE.__init__` with redundant slots that models leave out of ``num_experts``.

    Some do, GLM-4-MoE among them.
    """
    placement = plan_here()
    call = inspect.signature(original).bind(self, *args, **kwargs)
    if placement is not None:
        experts = call.arguments["num_experts"]
        shared = _shared_slots(call.arguments.get("num_fused_shared_experts", 0))
        if (draft := STATE.draft) is not None:
            call.arguments["num_experts"] = draft.slots(experts - shared) + shared
        elif experts - placement.num_logical_experts == shared:
            call.arguments["num_experts"] = experts + placement.num_redundant
    original(*call.args, **call.kwargs)
    if placement is not None:
        evidence.note_built(self)


def _shared_slots(shared: int) -> int:
    """Return the slots of fused shared experts in ``num_experts``.

    They are one set per rank with some all-to-all back ends.
    """
    from sglang.srt.layers.moe import utils

    per_rank = getattr(utils, "has_per_rank_fused_shared_slots", None)
    if per_rank is not None and per_rank(shared):
        from sglang.srt.runtime_context import get_parallel

        return shared * get_parallel().moe_ep_size
    return shared


def load(
    original: Callable,
    self: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int | None,
) -> None:
    """Run `FusedMoE.weight_loader`, noting which logical experts the checkpoint brings.

    Raises:
        PlacementError: for a tensor of all experts whose rows were not put into the order of the
            slots.
    """
    placement = plan_here()
    if placement is None:
        original(self, param, loaded_weight, weight_name, shard_id, expert_id)
    elif expert_id is None:
        if not positional.accepts_all_experts(self, loaded_weight, weight_name):
            raise PlacementError(
                f"layer {self.layer_id}: the checkpoint brings {weight_name} of all experts at "
                "once, past the map of experts: use a checkpoint with a tensor per expert, or "
                "leave the placement flags out"
            )
        original(self, param, loaded_weight, weight_name, shard_id, expert_id)
        own = draft_layers.of_layer(self)
        experts = placement.num_logical_experts if own is None else own.num_logical
        evidence.note_all(self, param, weight_name, shard_id or evidence.ALL_SHARDS, experts)
    elif not expert_reader.intercepted(
        self, param, loaded_weight, weight_name, shard_id, expert_id
    ):
        with evidence.bringing(self, param, weight_name, shard_id, int(expert_id)):
            draft_layers.load(
                original, self, param, loaded_weight, weight_name, shard_id, int(expert_id)
            )


def fill(
    original: Callable,
    self: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int,
) -> None:
    """Run `FusedMoE._weight_loader_impl`, which writes one slot of this rank, noting which.

    Raises:
        PlacementError: when it is not the slot of the expert that is brought, or the file keeps
            experts in its own order.
    """
    if plan_here() is not None:
        if getattr(param, "is_gguf_weight", False):
            raise PlacementError(
                f"layer {self.layer_id}: a GGUF file is kept in containers in the order of the "
                "file, past the map of experts: use a safetensors checkpoint, or leave the "
                "placement flags out"
            )
        evidence.note_slot(self, param, weight_name, shard_id, expert_id)
    original(self, param, loaded_weight, weight_name, shard_id, expert_id)


def after_load(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `ModelRunner.load_model`, then check every MoE layer.

    Raises:
        PlacementError: when a layer's slots, weights or routing do not go through the map.
    """
    draft = bool(getattr(self, "is_draft_worker", False))
    evidence.forget()
    settings, plan = placing(), plan_here()
    with (
        expert_reader.learning(settings is not None and settings.rebalancing.elastic and not draft),
        drafts.loading(self if draft else None),
    ):
        result = original(self, *args, **kwargs)
    if settings is None or plan is None:
        pass
    elif draft:
        drafts.settle(self, settings)
    else:
        layers = check_layers(self.model, plan, settings.loading.reads)
        if not layers and settings.loading.stages == 1:
            raise PlacementError(
                f"{type(self.model).__name__} has no FusedMoE layer: serve it without the "
                "placement flags"
            )
        if settings.rebalancing.moves:
            from . import eplb, eplb_exchange  # lazy: numba

            eplb.list_weights(self.model)
            eplb_exchange.gather_rank_facts(settings, self.model)
            eplb.warm_up(settings)
        logger.info(
            "moe_placement_plugin: EP rank %s: expert placement %s is in force in %d layers (plan "
            "%s), routed by one look-up in %d; patches used so far: %s",
            layers[0].moe_ep_rank if layers else "of a stage without MoE layers",
            plan.strategy,
            len(layers),
            plan.digest[:12],
            sum(map(direct.has_table, layers)),
            ", ".join(f"{name} {hits}" for name, hits in hits_of(PLACEMENT).items() if hits),
        )
    evidence.forget()
    return result


def check_layers(model: Any, placement: Placement, reads: bool) -> list[Any]:
    """Check every MoE layer of ``model`` and tell its TopK layer which layer it routes for.

    Args:
        model: the loaded model.
        placement: the placement in force.
        reads: whether a checkpoint was read.

    Returns:
        The expert layers.

    Raises:
        PlacementError: when a layer's slots, weights or routing do not go through the map.
    """
    seen: list[Any] = []
    for name, layer, router in moe_blocks(model):
        _check_experts(name, layer, placement)
        _check_method(name, layer)
        check_router(name, router)
        if reads:
            evidence.check(name, layer)
        object.__setattr__(router.topk_config, LAYER, layer.layer_id)
        table = direct.local_slots(placement, layer.layer_id, layer.moe_ep_rank)
        direct.settle(layer, router, placement.num_logical_experts, table)
        seen.append(layer)
    return seen


def _check_experts(name: str, layer: Any, placement: Placement) -> None:
    if layer.layer_id not in placement.layer_ids:
        raise PlacementError(
            f"{name} is layer {layer.layer_id}, which the placement leaves out (it has "
            f"{list(placement.layer_ids)}): the model's config hides an MoE layer; serve it "
            "without the placement flags"
        )
    slots = layer._num_global_routed
    if slots != placement.num_slots or layer.moe_ep_size != placement.num_ranks:
        raise PlacementError(
            f"{name} was built with {slots} slots on {layer.moe_ep_size} ranks, the placement has "
            f"{placement.num_slots} on {placement.num_ranks}: this model counts its experts in a "
            "way of its own; serve it without the placement flags"
        )


def _check_method(name: str, layer: Any) -> None:
    import sglang

    from .placement_rules import unmapped_quantizations  # lazy: heavy

    method = type(layer.quant_method).__name__
    if method in unmapped_quantizations(sglang.__version__).values():
        raise PlacementError(
            f"{name} is quantized by {method}, whose loader puts zero points or scales where the "
            "trivial map has them: use an FP8, Marlin or bf16 checkpoint, or leave the placement "
            "flags out"
        )


def load_hooks() -> list[Hook]:
    """Return the hooks that build layers with the placement's slots and see them filled."""
    return [
        Hook(
            name="slots",
            target=f"{_FUSED_MOE}.__init__",
            hook=build,
            relies_on=("num_experts", "num_fused_shared_experts"),
            why="GLM-4-MoE builds its layers without the redundant slots",
            upstream="SGLang #18213",
            removable_when="every model adds ep_num_redundant_experts",
        ),
        Hook(
            name="loader",
            target=f"{_FUSED_MOE}.weight_loader",
            hook=load,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a checkpoint that goes round the map of experts must be noticed",
            upstream="SGLang #39580",
            removable_when="SGLang checks that every slot was filled",
        ),
        Hook(
            name="slot-loader",
            target=f"{_FUSED_MOE}._weight_loader_impl",
            hook=fill,
            relies_on=("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
            why="a slot that nothing fills must be noticed, also where no replica differs from it",
            upstream="vLLM #55228, SGLang #39580",
            removable_when="SGLang checks that every slot was filled",
        ),
        Hook(
            name="model",
            target="sglang.srt.model_executor.model_runner:ModelRunner.load_model",
            hook=after_load,
            relies_on=("self",),
            why="slots, weights and routing of every MoE layer are checked before the first "
            "request",
            removable_when="SGLang checks them",
        ),
    ]
