"""Send tokens, routed by logical expert, to physical slots where SGLang leaves that out.

Up to 0.5.22 several models call their TopK layer without the dispatch information, and the CPU
engine never remaps at all: with any placement but the trivial one the output is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from . import compat, direct, draft_layers
from .hook_registry import Hook

# Attribute of the TopK config of every MoE layer of the target model: the layer's id. A draft's
# have a row of their own.
LAYER = "_moe_placement_layer"


def _dispatch_info(topk_config: Any) -> Any:
    layer = getattr(topk_config, LAYER, None)
    if layer is None:
        return None
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    return ExpertLocationDispatchInfo.init_new(layer_id=layer)


def _resolve(topk_config: Any, given: Any) -> Any:
    """Return the dispatch information to route with; none where one look-up does.

    It is the model's own, else that of the layer. A draft's layer has its own, whatever the model
    gives: up to 0.5.22 that is the target's layer of the same number.
    """
    if direct.in_force(topk_config):
        return None
    draft = draft_layers.of_router(topk_config)
    if draft is not None:
        return draft.info
    return _dispatch_info(topk_config) if given is None else given


def select(
    original: Callable, hidden_states: Any, router_logits: Any, topk_config: Any, **rest: Any
) -> Any:
    """Run `select_experts` with the dispatch information of the layer, where its model passes none.

    Where one look-up does, it runs without. The information has to be known here already: without
    it some routers give out ids that can no longer be remapped. The torch-native router asserts
    that there is none; its ids are remapped afterwards, by `post_process`.
    """
    given = rest.get("expert_location_dispatch_info")
    if draft_layers.of_router(topk_config) is not None:
        later = topk_config.torch_native and not compat.topk_finds_the_placement()
        rest["expert_location_dispatch_info"] = None if later else _resolve(topk_config, given)
    elif given is not None or not topk_config.torch_native:
        rest["expert_location_dispatch_info"] = _resolve(topk_config, given)
    return original(hidden_states, router_logits, topk_config, **rest)


def post_process(
    original: Callable,
    topk_ids: Any,
    topk_weights: Any,
    topk_config: Any,
    router_logits: Any,
    layer_id: int | None,
    num_token_non_padded: Any = None,
    expert_location_dispatch_info: Any = None,
    **rest: Any,
) -> Any:
    """Run `_post_process_topk_ids`, remapping on devices for which SGLang leaves that out."""
    info = _resolve(topk_config, expert_location_dispatch_info)
    ids, weights, recorded = original(
        topk_ids,
        topk_weights,
        topk_config,
        router_logits,
        layer_id,
        num_token_non_padded,
        info,
        **rest,
    )
    if info is not None and not _device_remaps():
        shared = topk_config.num_fused_shared_experts
        ids = _remap(ids, shared, info)
        recorded = ids[:, : ids.shape[1] - shared]
    return ids, weights, recorded


def _remap(ids: Any, shared: int, info: Any) -> Any:
    """Return ``ids`` ``[tokens, top k]`` with the routed columns as physical ids.

    Ids of shared experts follow the routed ones. -1, a padded token's, stays -1: as an index it
    would be the last expert.
    """
    import torch
    from sglang.srt.eplb.expert_location_dispatch import topk_ids_logical_to_physical

    if not shared:
        physical = topk_ids_logical_to_physical(ids.clamp_min(0), info)
        return torch.where(ids < 0, ids, physical)
    routed, common = ids[:, :-shared], ids[:, -shared:]
    redundant = info.num_physical_experts - info.partial_logical_to_all_physical_map.shape[0]
    common = torch.where(common < 0, common, common + redundant)
    return torch.cat([_remap(routed.contiguous(), 0, info), common], dim=1)


@lru_cache(maxsize=1)
def _device_remaps() -> bool:
    """Tell whether SGLang's own code remaps here once it has the dispatch information."""
    from sglang.srt.layers.moe import topk

    return bool(topk._is_cuda or topk._is_hip)


def pick_by_row(original: Callable, topk_ids: Any, info: Any) -> Any:
    """Pick replicas as `_topk_ids_logical_to_physical_dynamic`, but the same on every rank.

    SGLang has this pick from 0.5.17. 0.5.16 draws random numbers on every rank: ranks that see the
    same tokens then disagree, and a replicated expert counts several times or not at all.
    """
    import torch
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    if not get_moe_a2a_backend().is_none():
        return original(topk_ids, info)
    experts = topk_ids.clamp_min(0)
    replicas = info.partial_logical_to_all_physical_map_num_valid[experts]
    rows = torch.arange(topk_ids.shape[0], dtype=replicas.dtype, device=topk_ids.device)
    rows = rows.view(-1, *[1] * (topk_ids.dim() - 1))
    physical = info.partial_logical_to_all_physical_map[experts, rows % replicas]
    return torch.where(topk_ids < 0, topk_ids, physical.to(topk_ids.dtype))


def routing_hooks() -> list[Hook]:
    """Return the hooks that send logical ids to slots where the installed SGLang does not."""
    chosen = [
        Hook(
            name="routing",
            target="sglang.srt.layers.moe.topk:select_experts",
            hook=select,
            relies_on=(
                "hidden_states",
                "router_logits",
                "topk_config",
                "expert_location_dispatch_info",
            ),
            counted=False,  # traced by --enable-torch-compile
            why="several models up to 0.5.22 route to logical ids without an all-to-all back end: "
            "wrong output; and a placement costs a look-up",
            upstream="the wrong output: mended in SGLang 0.5.23",
            removable_when="0.5.22 is no longer supported, and SGLang's dispatcher takes logical "
            "ids",
        ),
    ]
    if not compat.topk_finds_the_placement():
        chosen += [
            Hook(
                name="remap",
                target="sglang.srt.layers.moe.topk:_post_process_topk_ids",
                hook=post_process,
                relies_on=(
                    "topk_ids",
                    "topk_weights",
                    "topk_config",
                    "num_token_non_padded",
                    "expert_location_dispatch_info",
                ),
                counted=False,  # traced by --enable-torch-compile
                why="the CPU engine never sends logical ids to physical slots: wrong output",
                upstream="mended in SGLang 0.5.23",
                removable_when="0.5.22 is no longer supported",
            ),
        ]
    if not compat.dispatch_is_rank_invariant():
        chosen += [
            Hook(
                name="pick-by-row",
                target="sglang.srt.eplb.expert_location_dispatch:"
                "_topk_ids_logical_to_physical_dynamic",
                hook=pick_by_row,
                relies_on=("topk_ids", "info"),
                counted=False,
                why="ranks that see the same tokens draw different replicas",
                upstream="mended in SGLang 0.5.17",
                removable_when="0.5.16 is no longer supported",
            ),
        ]
    return chosen
