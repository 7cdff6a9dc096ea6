"""Give SGLang the placement as its own ``ExpertLocationMetadata``, in a worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...core.errors import PlacementError
from ...formats.sglang import to_sglang
from ..common.patching import EPLB, NEW_WEIGHTS, PLACEMENT, VERIFICATION
from ..common.settings import Settings
from . import compat, hosts
from .dispatch_table import dispatch_table
from .hook_registry import Hook, require_applied
from .state import placing

_LOCATION = "sglang.srt.eplb.expert_location"


def initial_metadata(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Answer `compute_initial_expert_location_metadata` with the placement, not the trivial one."""
    settings = placing()
    if settings is None:
        return original(*args, **kwargs)
    settings = hosts.agree(settings)
    plan = settings.plan
    if plan is None:
        raise PlacementError(
            "an expert placement was asked for, but this server was started in a way that never "
            "resolved it (the launcher did not call ServerArgs.check_server_args): start it with "
            "`python -m sglang.launch_server`, `sglang serve` or sglang.Engine"
        )
    _require_patches(settings)
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata, ModelConfigForExpertLocation

    call = inspect.signature(original).bind(*args, **kwargs).arguments
    shape = ModelConfigForExpertLocation.from_model_config(call["model_config"])
    if shape is None or shape.num_logical_experts != plan.num_logical_experts:
        raise PlacementError(
            f"the placement is for {plan.num_logical_experts} experts, this worker's model has "
            f"{getattr(shape, 'num_logical_experts', 'no map of experts')}: it was made for "
            "another model; plan again"
        )
    # A draft's layers have rows of their own, see `drafts`.
    own = replace(plan, draft=None)
    rows = to_sglang(own, shape.num_layers)["physical_to_logical_map"]
    metadata = ExpertLocationMetadata.init_by_mapping(**call, physical_to_logical_map=rows)
    if metadata.physical_to_logical_map_cpu.tolist() != rows:
        raise PlacementError(
            "SGLang changed the placement on the way to its workers: use a supported version"
        )
    return metadata


def _require_patches(settings: Settings) -> None:
    """Refuse to go on without a patch that should be in force in this worker.

    Raises:
        PlacementError: naming it.
    """
    needed = {
        PLACEMENT: True,
        NEW_WEIGHTS: True,
        EPLB: settings.rebalancing.moves,
        VERIFICATION: settings.verification.on,
    }
    for name, wanted in needed.items():
        if wanted:
            require_applied(name)


def keep_all_replicas(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run `_compute_logical_to_all_physical_map` without pruning to the rank's own replica.

    Without an all-to-all back end every rank runs the layer over the same tokens, so all must pick
    the same replica.
    """
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    call = inspect.signature(original).bind(*args, **kwargs)
    if get_moe_a2a_backend().is_none():
        call.arguments["moe_ep_rank"] = None
    return original(*call.args, **call.kwargs)


def static_dispatch(original: Callable, *args: Any, **kwargs: Any) -> Any:
    """Answer `compute_logical_to_rank_dispatch_physical_map`, vectorized and evenly spread."""
    import torch
    from sglang.srt.eplb import expert_location

    bound = inspect.signature(original).bind(*args, **kwargs)
    call = bound.arguments
    slots_of = call["logical_to_all_physical_map"]
    if compat.takes_server_args(original):
        server_args = call["server_args"]
        by_node = expert_location._prefer_same_node_experts(server_args)
        ep_size, nodes = server_args.ep_size, server_args.nnodes
    else:
        from sglang.srt.runtime_context import get_parallel

        by_node = expert_location._prefer_same_node_experts()
        parallel = get_parallel()
        ep_size, nodes = parallel.ep_size, parallel.nnodes
    table = dispatch_table(
        slots_of.cpu().numpy(),
        call["ep_size"],
        call["num_physical_experts"],
        ep_size // nodes if by_node else None,
        [call["ep_rank"]],
    )
    return torch.from_numpy(table[0]).to(slots_of.device)


def map_hooks() -> list[Hook]:
    """Return the hooks that give SGLang the placement for its map of experts."""
    chosen = [
        Hook(
            name="placement",
            target=f"{_LOCATION}:compute_initial_expert_location_metadata",
            hook=initial_metadata,
            relies_on=("model_config", "moe_ep_rank"),
            why="--init-expert-location knows neither strategies nor other engines' plans, and "
            "checks neither shape nor coverage",
            upstream="SGLang #37923, #32962",
            removable_when="SGLang reads placement plans and validates them",
        ),
        Hook(
            name="static-dispatch",
            target=f"{_LOCATION}:compute_logical_to_rank_dispatch_physical_map",
            hook=static_dispatch,
            relies_on=("logical_to_all_physical_map", "ep_size", "num_physical_experts", "ep_rank"),
            why="Python loops over layers, experts and ranks, and all ranks of a node share one "
            "replica",
            removable_when="SGLang vectorizes it and spreads the ranks over the replicas",
        ),
    ]
    if not compat.dispatch_is_rank_invariant():
        chosen += [
            Hook(
                name="all-replicas",
                target=f"{_LOCATION}:_compute_logical_to_all_physical_map",
                hook=keep_all_replicas,
                relies_on=("moe_ep_rank",),
                why="each rank keeps only its own replica, and a replicated expert then counts "
                "several times",
                upstream="mended in SGLang 0.5.17",
                removable_when="0.5.16 is no longer supported",
            ),
        ]
    return chosen
