"""The planner behind the signature of SGLang's `sglang.srt.eplb.eplb_algorithms.rebalance_experts`.

A pure function over CPU tensors; making the engine use it is another module's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import PlacementError
from ...planner import plan
from ...rebalancing.tables import inverse_maps

if TYPE_CHECKING:
    import torch


def rebalance_experts(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan the placement of every layer for all recorded steps at once.

    Args:
        tokens_per_expert: [steps, layers, num_logical_experts], token counts.
        num_physical_experts: per layer; num_local_physical_experts: of each rank.
        num_groups: expert groups, None for a model without; num_nodes: nodes.
        algorithm: SGLang's `EplbAlgorithm`, or its name: one that ends in `hierarchical` keeps all experts of a group on one node.

    Returns:
        physical_to_logical_map: int64 [layers, num_physical_experts].
        logical_to_physical_map: int64 [layers, num_logical_experts, most replicas], -1 where an expert has fewer.
        logical_count: int64 [layers, num_logical_experts], replicas of each expert.

    Raises:
        PlacementError: when the numbers do not fit together.
    """
    import torch

    load = tokens_per_expert.detach().to(device="cpu", dtype=torch.float64).numpy()
    name = str(getattr(algorithm, "name", algorithm))
    table = rebalance_table(
        load,
        num_physical_experts,
        num_local_physical_experts,
        num_groups,
        num_nodes,
        name.endswith("hierarchical"),
    )
    to_physical, count = inverse_maps(table, load.shape[-1])
    return (
        torch.from_numpy(table.astype(np.int64)),
        torch.from_numpy(to_physical),
        torch.from_numpy(count),
    )


def rebalance_table(
    load, num_physical_experts, num_local_physical_experts, num_groups, num_nodes, hierarchical
) -> np.ndarray:
    """The plan of `rebalance_experts` over numpy arrays; int32 [layers, num_physical_experts]."""
    if num_local_physical_experts < 1 or num_physical_experts % num_local_physical_experts:
        raise PlacementError(
            f"{num_physical_experts} physical experts, {num_local_physical_experts} to a rank: the engine gives every rank as many; "
            "change the number of redundant experts so that they divide"
        )
    num_ranks = num_physical_experts // num_local_physical_experts
    if hierarchical and (not num_groups or num_groups % num_nodes or num_ranks % num_nodes):
        raise PlacementError(
            f"a hierarchical plan of {num_groups} groups and {num_ranks} ranks on {num_nodes} nodes: both must divide over the nodes; "
            "choose an algorithm that is not hierarchical"
        )
    return plan(
        load,
        np.full(num_ranks, num_local_physical_experts, np.int64),
        node_of_rank=np.arange(num_ranks) * num_nodes // num_ranks,
        num_groups=num_groups if hierarchical else 1,
        locality="node" if hierarchical else "none",
    ).physical_to_logical
