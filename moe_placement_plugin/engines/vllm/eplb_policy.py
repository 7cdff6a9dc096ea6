"""The planner behind the signature of vLLM's `AbstractEplbPolicy.rebalance_experts`.

A pure function over CPU tensors; making the engine use it is another module's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...rebalancing.tables import rebalance_table

if TYPE_CHECKING:
    import torch


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
        None
        if old_global_expert_indices is None
        else old_global_expert_indices.detach().cpu().numpy(),
    )
    return torch.from_numpy(table.astype(np.int64))
