"""The planner behind the signature of vLLM's `AbstractEplbPolicy.rebalance_experts`.

A pure function over CPU tensors; making the engine use it is another module's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...errors import PlacementError
from ...planner import plan, replan

if TYPE_CHECKING:
    import torch

REGROUP_GAIN = 0.05
"""Groups change nodes, for which almost every slot has to be fetched, where that raises balancedness by more than this fraction."""


def rebalance_experts(
    weight: torch.Tensor,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_ranks: int,
    old_global_expert_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plan the placement of every layer.

    With an old placement of the same size the plan moves only what pays (`replan`); without one it is planned from nothing. As in vLLM's
    default policy all experts of a group stay on one node if the groups divide over the nodes; groups change nodes only where that
    gains more than `REGROUP_GAIN`.

    Args:
        weight: [layers, num_logical_experts], token counts.
        num_replicas: physical experts per layer, a multiple of `num_ranks`.
        num_groups: expert groups; num_nodes: nodes, `num_ranks` a multiple of it; num_ranks: EP ranks.
        old_global_expert_indices: [layers, num_replicas], the placement in service.

    Returns:
        [layers, num_replicas] int64 on the CPU, the logical expert of each physical one.

    Raises:
        PlacementError: when the numbers do not fit together.
    """
    import torch

    load = weight.detach().to(device="cpu", dtype=torch.float64).numpy()
    table = rebalance_table(
        load,
        num_replicas,
        num_groups,
        num_nodes,
        num_ranks,
        None if old_global_expert_indices is None else old_global_expert_indices.detach().cpu().numpy(),
    )
    return torch.from_numpy(table.astype(np.int64))


def rebalance_table(load, num_replicas, num_groups, num_nodes, num_ranks, old=None, max_moves=None) -> np.ndarray:
    """`rebalance_experts` over numpy arrays, with at most `max_moves` slots that change rank; int32 [layers, num_replicas]."""
    slots = even_slots_or_raise(num_replicas, num_ranks)
    hierarchical = num_nodes > 1 and num_groups % num_nodes == 0
    if old is not None and not _in_service(old, load.shape, num_replicas):
        old = None
    if not hierarchical:
        return (plan(load, slots) if old is None else replan(load, old, slots, max_moves=max_moves)).physical_to_logical
    where = {"node_of_rank": np.arange(num_ranks) // max(1, num_ranks // num_nodes), "num_groups": num_groups, "locality": "node"}
    fresh = plan(load, slots, old=old, **where)
    if old is None:
        return fresh.physical_to_logical
    try:
        kept = replan(load, old, slots, max_moves=max_moves, **where)
    except PlacementError:  # a group lies on several nodes, as where the engine has just started: bring it together
        return fresh.physical_to_logical
    regroup = max_moves is None and fresh.overall > (1 + REGROUP_GAIN) * kept.overall
    return (fresh if regroup else kept).physical_to_logical


def even_slots_or_raise(num_replicas: int, num_ranks: int) -> np.ndarray:
    """int64 [ranks]: the slots of each rank.

    Raises:
        PlacementError: if the physical experts do not divide over the ranks.
    """
    if num_ranks < 1 or num_replicas % num_ranks:
        raise PlacementError(
            f"{num_replicas} physical experts on {num_ranks} ranks: the engine gives every rank as many; "
            "change the number of redundant experts so that they divide"
        )
    return np.full(num_ranks, num_replicas // num_ranks, np.int64)


def _in_service(old: np.ndarray, load_shape: tuple[int, int], num_replicas: int) -> bool:
    """Whether `old` is a whole placement of this size; during elastic scaling it may not be."""
    layers, experts = load_shape
    if old.shape != (layers, num_replicas) or old.min() < 0 or old.max() >= experts:
        return False
    held = np.zeros((layers, experts), bool)
    np.put_along_axis(held, old.astype(np.int64), True, axis=1)
    return bool(held.all())
