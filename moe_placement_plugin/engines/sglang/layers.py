"""MoE layers with the placement's slots, and proof after loading that every slot was filled through the map."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ...errors import PlacementError
from ...placement import Placement
from . import direct, expert_reader, settings
from .routing import LAYER

logger = logging.getLogger(__name__)

# (layer, shard) -> logical experts that the checkpoint brought; cleared once they have been checked.
_loaded: dict[tuple[int, str], set[int]] = defaultdict(set)

# (layer, shard, tensor's address as an object) -> slots of this rank that were written; cleared with the above.
_filled: dict[tuple[int, str, int], set[int]] = defaultdict(set)


def forget_loaded() -> None:
    """Begin anew: what was loaded so far is another model's."""
    _loaded.clear()
    _filled.clear()


def _placement() -> Placement | None:
    asked = settings.current()
    return asked.placement if asked is not None else None


def redundant_per_rank() -> int:
    """Redundant experts that each rank holds in a layer, 0 without a placement."""
    placement = _placement()
    return 0 if placement is None else placement.num_redundant // placement.num_ranks


def build(original: Callable, self: Any, *args: Any, **kwargs: Any) -> None:
    """`FusedMoE.__init__` with the redundant slots that some models (GLM-4-MoE) leave out of ``num_experts``."""
    placement = _placement()
    call = inspect.signature(original).bind(self, *args, **kwargs)
    if placement is not None:
        experts = call.arguments["num_experts"]
        shared = experts - placement.num_logical_experts
        if 0 <= shared == _shared_slots(call.arguments.get("num_fused_shared_experts", 0)):
            call.arguments["num_experts"] = experts + placement.num_redundant
    original(*call.args, **call.kwargs)


def _shared_slots(shared: int) -> int:
    """Slots of fused shared experts in ``num_experts``: one set per rank with some all-to-all back ends."""
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
    """`FusedMoE.weight_loader`, noting which logical experts the checkpoint brings."""
    if _placement() is not None:
        if expert_id is not None and expert_reader.intercepted(
            self, param, loaded_weight, weight_name, shard_id, expert_id
        ):
            return
        if expert_id is None:
            raise PlacementError(
                f"layer {self.layer_id}: the checkpoint brings {weight_name} of all experts at once, past the map of experts: "
                "use a checkpoint with a tensor per expert, or leave the placement flags out"
            )
        _loaded[self.layer_id, shard_id].add(int(expert_id))
    original(self, param, loaded_weight, weight_name, shard_id, expert_id)


def fill(
    original: Callable,
    self: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int,
) -> None:
    """`FusedMoE._weight_loader_impl`, which writes one slot of this rank, noting which.

    Weight matrices only: checkpoints may leave a scale of a single expert to its default.
    """
    if _placement() is not None and param.dim() >= 3:
        _filled[self.layer_id, shard_id, id(param)].add(expert_id)
    original(self, param, loaded_weight, weight_name, shard_id, expert_id)


def load_fused(
    original: Callable, self: Any, param: Any, loaded_weight: Any, weight_name: str, shard_id: str
) -> None:
    """`FusedMoE.weight_loader_fused`, which fills all slots at once, with the rows of this rank's slots.

    Stock SGLang copies the checkpoint's experts by position; with expert parallelism the shapes do not even agree.
    """
    placement = _placement()
    if placement is not None and self.layer_id in placement.layer_ids:
        if loaded_weight.shape[0] != placement.num_logical_experts:
            raise PlacementError(
                f"layer {self.layer_id}: the checkpoint brings {loaded_weight.shape[0]} of {placement.num_logical_experts} "
                "experts at once, so that it is not known which: use a checkpoint with a tensor per expert, or leave the "
                "placement flags out"
            )
        if expert_reader.intercepted(
            self, param, loaded_weight, weight_name, shard_id, None, original
        ):
            return
        local = placement.local_experts(placement.row(self.layer_id), self.moe_ep_rank)
        loaded_weight = loaded_weight[local.tolist()]
        _loaded[self.layer_id, shard_id].update(range(placement.num_logical_experts))
    original(self, param, loaded_weight, weight_name, shard_id)


def after_load(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """`ModelRunner.load_model`, then a check of every MoE layer of the target model.

    Raises:
        PlacementError: when a layer's slots, weights or routing do not go through the map.
    """
    draft = bool(getattr(self, "is_draft_worker", False))
    if not draft:
        forget_loaded()
    asked = settings.current()
    with expert_reader.learning(asked is not None and asked.elastic and not draft):
        result = original(self, *args, **kwargs)
    if asked is not None and asked.placement is not None and not draft:
        layers = check_layers(self.model, asked.placement, asked.reads)
        if not layers and asked.stages == 1:
            raise PlacementError(
                f"{type(self.model).__name__} has no FusedMoE layer: serve it without the placement flags"
            )
        from . import eplb, eplb_update
        from .worker import hooks

        if asked.moves:
            eplb.list_weights(self.model)
            eplb_update.meet(asked, self.model)
            eplb.warm_up(asked)

        logger.info(
            "moe_placement_plugin: EP rank %s: expert placement %s is in force in %d layers (plan %s), routed by one look-up in %d; "
            "patches used so far: %s",
            layers[0].moe_ep_rank if layers else "of a stage without MoE layers",
            asked.placement.strategy,
            len(layers),
            asked.placement.digest[:12],
            sum(map(direct.has_table, layers)),
            ", ".join(f"{name} {hits}" for name, hits in hooks().hits().items() if hits),
        )
    forget_loaded()
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
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    seen: list[Any] = []
    for name, parent in model.named_modules():
        children = list(parent.children())
        experts = [child for child in children if isinstance(child, FusedMoE)]
        if not experts:
            continue
        routers = [child for child in children if isinstance(child, TopK)]
        if len(experts) != 1 or len(routers) != 1:
            raise PlacementError(
                f"{name} has {len(experts)} expert layers and {len(routers)} TopK layers, expected one of each: this model "
                "routes in a way of its own; serve it without the placement flags"
            )
        _check_experts(name, experts[0], placement)
        _check_method(name, experts[0])
        _check_router(name, routers[0])
        if reads:
            _check_weights(name, experts[0], placement)
        object.__setattr__(routers[0].topk_config, LAYER, experts[0].layer_id)
        direct.settle(experts[0], routers[0], placement)
        seen.append(experts[0])
    return seen


def _check_experts(name: str, layer: Any, placement: Placement) -> None:
    if layer.layer_id not in placement.layer_ids:
        raise PlacementError(
            f"{name} is layer {layer.layer_id}, which the placement leaves out (it has {list(placement.layer_ids)}): the "
            "model's config hides an MoE layer; serve it without the placement flags"
        )
    slots = layer._num_global_routed
    if slots != placement.num_slots or layer.moe_ep_size != placement.num_ranks:
        raise PlacementError(
            f"{name} was built with {slots} slots on {layer.moe_ep_size} ranks, the placement has {placement.num_slots} on "
            f"{placement.num_ranks}: this model counts its experts in a way of its own; serve it without the placement flags"
        )


def _check_method(name: str, layer: Any) -> None:
    import sglang

    from .support import unmapped_quantizations

    method = type(layer.quant_method).__name__
    if method in unmapped_quantizations(sglang.__version__).values():
        raise PlacementError(
            f"{name} is quantized by {method}, whose loader puts zero points or scales where the trivial map has them: use an FP8, "
            "Marlin or bf16 checkpoint, or leave the placement flags out"
        )


def _check_router(name: str, router: Any) -> None:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    output = getattr(router.topk_config.output_format, "name", None)
    backend = get_moe_runner_backend()
    if output in ("BYPASSED", "TRITON_KERNEL") or (
        output is None
        and (
            backend.is_triton_kernels()
            or backend.is_flashinfer_trtllm()
            or backend.is_flashinfer_mxfp4()
        )
    ):
        raise PlacementError(
            f"{name} routes inside its kernel ({output or backend.value}), which never sees the map of experts: choose "
            "--moe-runner-backend triton or another that the table in docs/sglang.md lists, or leave the placement flags out"
        )


def _check_weights(name: str, layer: Any, placement: Placement) -> None:
    shards = {
        shard: experts
        for (layer_id, shard), experts in _loaded.items()
        if layer_id == layer.layer_id
    }
    every = set(range(placement.num_logical_experts))
    if not shards:
        raise PlacementError(
            f"{name}: its weights did not come through FusedMoE's loader, so that the placement was not heeded: use "
            "--load-format auto with the model's original checkpoint, or leave the placement flags out"
        )
    for shard, experts in shards.items():
        missing = sorted(every - experts)
        if missing:
            raise PlacementError(
                f"{name}: the checkpoint brought {shard} of {len(every) - len(missing)} of {len(every)} experts, expert "
                f"{missing[0]} is missing: its slots hold no weights; use a complete checkpoint"
            )
    for (layer_id, shard, _), slots in _filled.items():
        empty = (
            sorted(set(range(layer._num_local_routed)) - slots)
            if layer_id == layer.layer_id
            else []
        )
        if empty:
            expert = placement.local_experts(placement.row(layer_id), layer.moe_ep_rank)[empty[0]]
            raise PlacementError(
                f"{name}: nothing filled slot {empty[0]} of rank {layer.moe_ep_rank} with {shard} of expert {expert}"
                f"{f', nor {len(empty) - 1} more slots' if len(empty) > 1 else ''}: a loader went round SGLang's map of experts; use the "
                "model's original checkpoint, or leave the placement flags out"
            )
