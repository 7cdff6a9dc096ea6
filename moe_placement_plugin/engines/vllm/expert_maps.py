"""Static placement: every layer's expert map, its routing tables and the loader's filter follow the plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.placement import Placement, even_slots
from ...core.topology import Topology
from ...strategies import PlacementRequest, get_strategy
from ..common.patching import Patch
from ..common.settings import Settings
from .drafts import draft_layer_id, loading_draft
from .evidence import evidence_patches, watch
from .kernels import check_experts
from .layers import layer_id_of, moved_slots
from .state import current_settings

_FM = "vllm.model_executor.layers.fused_moe"
_LOADER = "vllm.model_executor.model_loader"


def expert_map(
    settings: Settings,
    layer_id: int | None,
    num_experts: int,
    ep_size: int,
    ep_rank: int,
    draft: bool = False,
) -> np.ndarray:
    """Return int32 ``[experts]``: local slot of each expert on ``ep_rank``, -1 where it lies elsewhere.

    Layers that the plan does not know (an encoder's; a draft's without rows of its own) are placed
    by the strategy itself, or contiguously when it plans from a load.

    Args:
        settings: the engine's.
        layer_id: number of the layer in the model, or in the draft.
        num_experts: its logical experts.
        ep_size: number of EP ranks.
        ep_rank: the rank.
        draft: the layer is the draft's, see `drafts`.
    """
    plan = settings.plan
    if draft and plan is not None:
        plan = plan.draft
    known = knows(plan, layer_id, num_experts)
    if plan is not None and layer_id is not None and known and plan.num_ranks == ep_size:
        return plan.expert_map(plan.row(layer_id), ep_rank)
    return _by_strategy(settings.strategy, num_experts, ep_size).expert_map(0, ep_rank)


def knows(plan: Placement | None, layer_id: int | None, num_experts: int) -> bool:
    """Decide whether a plan holds a layer."""
    return (
        plan is not None and layer_id in plan.layer_ids and plan.num_logical_experts == num_experts
    )


def _by_strategy(name: str, num_experts: int, ep_size: int) -> Placement:
    """Place one layer by a strategy without a load."""
    strategy = get_strategy(name)
    if strategy.needs_load:
        strategy = get_strategy("linear")
    slots = even_slots(num_experts, ep_size)
    return strategy.place(PlacementRequest(1, num_experts, Topology(ep_size), slots_per_rank=slots))


class LocalExperts(set):
    """The experts of this rank in any layer, with the exact ones of each layer behind it.

    vLLM's filter has one set for the whole model. A plan that differs by layer needs one per layer, else a
    rank would read nearly every expert. A draft's checkpoint may number its layers otherwise than the modules
    that it is loaded into: there an expert is read that any of the draft's layers has here.
    """

    def __init__(
        self,
        settings: Settings,
        num_experts: int,
        ep_size: int,
        ep_rank: int,
        draft: bool = False,
    ):
        self._arguments = (num_experts, ep_size, ep_rank, draft)
        self.draft = draft
        self._settings = settings
        self._by_layer: dict[int | None, frozenset[int]] = {}
        plan = settings.static
        if draft:
            plan = None if plan is None else plan.draft
        layers = plan.layer_ids if plan is not None else (None,)
        super().__init__(expert for layer in layers for expert in self.of_layer(layer))

    def of_layer(self, layer_id: int | None) -> frozenset[int]:
        """The experts of this rank in one layer."""
        if layer_id not in self._by_layer:
            local = expert_map(self._settings, layer_id, *self._arguments)
            self._by_layer[layer_id] = frozenset(np.flatnonzero(local >= 0).tolist())
        return self._by_layer[layer_id]

    def __reduce__(self):
        return LocalExperts, (self._settings, *self._arguments)


def _determine_expert_map(original):
    def determine_expert_map(
        ep_size, ep_rank, global_num_experts, expert_placement_strategy="linear", *args, **kwargs
    ):
        settings = current_settings()
        if settings is None or settings.static is None or ep_size == 1:
            return original(
                ep_size, ep_rank, global_num_experts, expert_placement_strategy, *args, **kwargs
            )
        # The layer is not known here; RoutedExperts.__init__ puts its own map in place. Until then, and in vLLM's
        # log line, the first layer's map stands.
        first = settings.static.layer_ids[0]
        return _map_tensors(
            expert_map(settings, first, global_num_experts, ep_size, ep_rank), *args, **kwargs
        )

    return determine_expert_map


def _map_tensors(
    slots: np.ndarray, num_fused_shared_experts: int = 0, return_expert_mask: bool = False
):
    """(local experts, expert map, expert mask) in the form of vLLM's ``determine_expert_map``.

    The tensors are made on torch's default device, which vLLM sets to the accelerator while it builds the model.
    """
    import torch

    local = int((slots >= 0).sum())
    values = slots.tolist()
    if not return_expert_mask:
        return local, torch.tensor(values, dtype=torch.int32), None
    mask = [int(v >= 0) for v in values] + [1] * num_fused_shared_experts + [0]
    values += range(local, local + num_fused_shared_experts)
    return local, torch.tensor(values, dtype=torch.int32), torch.tensor(mask, dtype=torch.int32)


def _routing_tables(settings: Settings, layer_id: int | None, manager: Any):
    """(global to physical, physical to global, local to global) for back ends that sort tokens by such tables.

    A physical id is rank * slots per rank + local slot, as those back ends split it. The first table has one entry more than
    there are experts: padded tokens carry id -1 (vLLM 0.33), and what index -1 finds has to be -1 again, not the last expert.
    """
    import torch

    if shared := getattr(manager, "num_fused_shared_experts", 0):
        raise PlacementError(
            f"all2all back end {manager.moe_parallel_config.all2all_backend} with {shared} fused shared experts, whose ids lie "
            "behind the routed ones and in no routing table: use --all2all-backend allgather_reducescatter"
        )
    experts, ranks = manager.global_num_experts, manager.ep_size
    maps = [
        expert_map(settings, layer_id, experts, ranks, rank, loading_draft())
        for rank in range(ranks)
    ]
    per_rank = {int((m >= 0).sum()) for m in maps}
    if len(per_rank) != 1:
        raise PlacementError(
            f"all2all back end {manager.moe_parallel_config.all2all_backend} needs the same number of experts on every rank, "
            f"got {sorted(per_rank)}: use --all2all-backend allgather_reducescatter"
        )
    slots = per_rank.pop()
    to_physical = np.full(experts + 1, -1, dtype=np.int64)
    for rank, local_slots in enumerate(maps):
        here = np.flatnonzero(local_slots >= 0)
        to_physical[here] = rank * slots + local_slots[here]
    to_global = np.argsort(to_physical[:-1])
    local = to_global[manager.ep_rank * slots : (manager.ep_rank + 1) * slots]
    return tuple(
        torch.tensor(table.tolist(), dtype=torch.long) for table in (to_physical, to_global, local)
    )


def _number(layer_name: str) -> int | None:
    """The layer's number in the model that is being built, the target or its draft."""
    return draft_layer_id(layer_name) if loading_draft() else layer_id_of(layer_name)


def _place_layer(settings: Settings, layer_name: str, moe_config: Any, manager: Any) -> None:
    """Give one layer's `ExpertMapManager` and config the maps of the plan, before weights are made."""
    layer_id = _number(layer_name)
    experts, ranks, rank = manager.global_num_experts, manager.ep_size, manager.ep_rank
    local, on_device, mask = _map_tensors(
        expert_map(settings, layer_id, experts, ranks, rank, loading_draft()),
        manager.num_fused_shared_experts,
        manager.rocm_aiter_enabled,
    )
    manager._local_num_experts = local + manager.num_fused_shared_experts
    manager._expert_map = on_device
    manager._expert_mask = mask
    if manager.moe_parallel_config.needs_round_robin_routing_tables:
        manager._routing_tables = _routing_tables(settings, layer_id, manager)
    moe_config.num_local_experts = manager._local_num_experts


def _routed_experts_init(original):
    def __init__(
        self,
        layer_name,
        params_dtype,
        moe_config,
        quant_config,
        expert_map_manager,
        *args,
        **kwargs,
    ):
        settings = current_settings()
        if settings is not None and (not settings.places or expert_map_manager.ep_size == 1):
            settings = None  # this layer is vLLM's own
        placed = settings is not None and settings.static is not None
        if settings is not None and placed:
            _place_layer(settings, layer_name, moe_config, expert_map_manager)
        original(
            self,
            layer_name,
            params_dtype,
            moe_config,
            quant_config,
            expert_map_manager,
            *args,
            **kwargs,
        )
        if placed:
            check_experts(
                self.quant_method,
                expert_map_manager.moe_parallel_config.needs_round_robin_routing_tables,
                layer_name,
            )
        if settings is not None:
            watch(self, moved_slots(self))

    return __init__


def _compute_local_expert_ids(original):
    def compute_local_expert_ids(num_experts, ep_size, ep_rank, placement="linear"):
        settings = current_settings()
        if settings is None or settings.static is None or ep_size <= 1:
            return original(num_experts, ep_size, ep_rank, placement)
        return LocalExperts(settings, num_experts, ep_size, ep_rank, loading_draft())

    return compute_local_expert_ids


def _should_skip_weight(original):
    def should_skip_weight(weight_name, local_expert_ids):
        if isinstance(local_expert_ids, LocalExperts) and not local_expert_ids.draft:
            layer_id = layer_id_of(weight_name)
            if layer_id is None:
                return False  # a layer that cannot be told for sure is read
            local_expert_ids = local_expert_ids.of_layer(layer_id)
        return original(weight_name, local_expert_ids)

    return should_skip_weight


def static_patches() -> list[Patch]:
    """The patches of static placement."""
    return [
        Patch(
            "expert-map",
            f"{_FM}.expert_map_manager:determine_expert_map",
            _determine_expert_map,
            relies_on=("ep_size", "ep_rank", "global_num_experts", "expert_placement_strategy", "num_fused_shared_experts",
                       "return_expert_mask"),
            why="vLLM places by linear or round_robin only, the same in every layer",
            upstream="vLLM PR 21497, PR 23745, issue 52435",
            removable_when="vLLM takes placement strategies from plugins",
        ),
        Patch(
            "layer-placement",
            f"{_FM}.routed_experts:RoutedExperts.__init__",
            _routed_experts_init,
            relies_on=("layer_name", "params_dtype", "moe_config", "quant_config", "expert_map_manager"),
            why="the expert map manager does not know which layer it serves; the layer does, before it makes its weights",
            upstream="vLLM issue 34297",
            removable_when="vLLM accepts a placement per layer",
        ),
        Patch(
            "weight-filter",
            f"{_LOADER}.default_loader:compute_local_expert_ids",
            _compute_local_expert_ids,
            relies_on=("num_experts", "ep_size", "ep_rank", "placement"),
            why="--enable-ep-weight-filter computes the local experts from the flag instead of the map in force and so drops "
            "weights when the two differ",
            upstream="vLLM PR 23745 (falls back after the filter was computed)",
            removable_when="the filter reads the layers' own maps",
        ),
        Patch(
            "weight-filter-by-layer",
            f"{_LOADER}.weight_utils:should_skip_weight",
            _should_skip_weight,
            relies_on=("weight_name", "local_expert_ids"),
            why="the filter has one set of experts for the whole model, a plan one per layer",
            removable_when="the filter reads the layers' own maps",
        ),
        *evidence_patches(),
    ]  # fmt: skip
