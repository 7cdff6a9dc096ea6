"""Look up this rank's slot of a logical expert once, where SGLang makes two look-ups.

Without an all-to-all back end SGLang sends logical ids to physical slots, a kernel in each layer,
and its dispatcher sends those to the slots of this rank, another kernel, which expert parallelism
has anyway. Where every expert has one slot and keeps it, the dispatcher's table does for both, so
that a placement costs what its absence costs: on four H200 the first look-up was 2.2 of 186
microseconds of a layer of Qwen3-30B-A3B's shape that decodes 128 tokens; on two, without it, placed
layers take 280.7 to 281.1 and stock's 280.4 and 280.8 (SGLang 0.5.16).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.placement import Placement
from .combination import Combination
from .state import placing

_EXPERTS = "_moe_placement_experts"
"""Attribute of the TopK config of a layer whose dispatcher was given a table: its ``FusedMoE``."""
_TABLE = "_moe_placement_table"
"""Attribute of such a dispatcher: the table."""
METHODS = ("UnquantizedFusedMoEMethod", "Fp8MoEMethod")


def allowed(combination: Combination) -> bool:
    """Tell whether nothing else needs physical ids in a server that is started so."""
    physical = {"enable_eplb", "elastic_ep_backend", "expert_distribution_recorder_mode"}
    return (
        combination.redundant == 0
        and combination.a2a_backend == "none"
        and not combination.options & physical
    )


def settle(layer: Any, router: Any, experts: int, table: np.ndarray) -> None:
    """Give a layer's dispatcher the table of both look-ups, where that is right.

    Args:
        layer: a loaded ``FusedMoE``.
        router: the TopK layer that routes for it.
        experts: logical experts.
        table: int32 ``[experts + 1]``, see `local_slots`.
    """
    settings = placing()
    if settings is None or not settings.loading.direct:
        return
    if not _takes_local_slots(layer.quant_method):
        return
    import torch
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatcher
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.utils.common import get_device

    device = torch.device(get_device())  # the weights' may be another: --cpu-offload-gb
    if device.type not in (
        "cuda",
        "cpu",
    ):  # an NPU's router does not go through `routing.select`, which leaves the first look-up out
        return
    dispatcher = layer.dispatcher
    if type(router) is not TopK or type(dispatcher) is not StandardDispatcher:
        return
    if dispatcher.skip_local_expert_mapping or dispatcher.use_aiter_moe_runner:
        return
    if (
        dispatcher.num_local_shared_experts
        or dispatcher.num_experts != experts
        or dispatcher.moe_ep_size < 2
    ):
        return
    dispatcher.local_expert_mapping = torch.from_numpy(table).to(device)
    setattr(dispatcher, _TABLE, dispatcher.local_expert_mapping)
    object.__setattr__(router.topk_config, _EXPERTS, layer)


def local_slots(placement: Placement, layer_id: int, rank: int) -> np.ndarray:
    """Return the local slot of each expert on ``rank``, -1 elsewhere, as int32 ``[experts + 1]``.

    The last entry is what index -1, a padded token's, finds: no slot, where the last expert would
    be found without it.
    """
    return np.append(placement.expert_map(placement.row(layer_id), rank), np.int32(-1))


def _takes_local_slots(method: Any) -> bool:
    """Tell whether a layer's kernel sees slots of this rank and no map.

    Others (Marlin) read the dispatcher's table too, as one of physical experts.
    """
    backend = getattr(getattr(method, "runner", None), "runner_backend", None)
    return type(method).__name__ in METHODS and (
        backend is None or backend.is_triton() or backend.is_deep_gemm()
    )


def in_force(topk_config: Any) -> bool:
    """Tell whether the layer's logical ids are to stay what they are until its dispatcher."""
    layer = getattr(topk_config, _EXPERTS, None)
    return layer is not None and has_table(layer)


def has_table(layer: Any) -> bool:
    """Tell whether a layer's dispatcher and its table are those of `settle`.

    Where SGLang has put others in their place, it makes both look-ups.
    """
    table = getattr(layer.dispatcher, _TABLE, None)
    return table is not None and layer.dispatcher.local_expert_mapping is table
