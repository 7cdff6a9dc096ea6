"""Keep groups on the nodes that they are on: where they are, and how good any such plan can be."""

import numpy as np

from ...core.errors import PlacementError
from ..kernels.compiled import kernel
from ..kernels.state import Ranks
from .groups import check_groups
from .pack_groups import make_scratch, node_value


@kernel
def home_bounds(load, order, expert_home, ranks, bounds):
    """Write the bounds of plans that keep every expert on its node: those of the busiest node.

    Args:
        load: float64 [layers, experts].
        order: int64 [layers, experts], heaviest first.
        expert_home: int64 [layers, experts].
        ranks: `Ranks`, nodes ascending.
        bounds: `Bounds`, written.
    """
    layers, experts = load.shape
    start = ranks.start
    node_of = ranks.node_of
    scratch = make_scratch(experts, experts, ranks.rank_of.size)
    for layer in range(layers):
        bounds.busiest[layer] = 0.0
        bounds.largest[layer] = 0.0
        first = 0
        while first < node_of.size:
            last = first
            while last < node_of.size and node_of[last] == node_of[first]:
                last += 1
            for e in range(experts):
                scratch.members[e] = expert_home[layer, e] == node_of[first]
            if scratch.members.any():
                value, replica = node_value(
                    load[layer],
                    order[layer],
                    start[first : last + 1] - start[first],
                    ranks.inverse_speed[first:last],
                    False,
                    scratch,
                )
                bounds.busiest[layer] = max(bounds.busiest[layer], value)
                bounds.largest[layer] = max(bounds.largest[layer], replica)
            first = last


def homes_in_service(
    old: np.ndarray, ranks: Ranks, num_experts: int, num_groups: int
) -> np.ndarray:
    """Find the node that each expert's group is on in the placement in service.

    Args:
        old: int32 [layers, slots].
        ranks: the ranks.
        num_experts: logical experts per layer.
        num_groups: groups of consecutive experts.

    Returns:
        int64 [layers, experts].

    Raises:
        PlacementError: if the groups do not divide the experts, or one lies on several nodes.
    """
    check_groups(num_experts, num_groups)
    size = num_experts // num_groups
    node_of_slot = ranks.node_of[ranks.rank_of]
    group = old // size
    layer = np.arange(old.shape[0])[:, None]
    home = np.zeros((old.shape[0], num_groups), np.int64)
    home[layer, group] = node_of_slot
    away = np.argwhere(home[layer, group] != node_of_slot)
    if away.size:
        at, slot = away[0]
        raise PlacementError(
            f"an old placement with group {group[at, slot]} of layer {at} on several nodes: "
            "plan with locality node once, then replan"
        )
    return np.repeat(home, size, axis=1)
