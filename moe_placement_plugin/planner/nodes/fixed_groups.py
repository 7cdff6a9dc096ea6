"""Groups that stay on the nodes that they are on: where they are, and how good any plan can be that leaves them there."""

import numpy as np

from ...core.errors import PlacementError
from ..arguments import Ranks
from ..kernels.compiled import kernel
from .groups import check_groups, node_value


@kernel
def home_bounds(load, order, expert_home, start, node_of, inverse_speed, bound, largest):
    """Write float64 [layers] each: the busiest node's lower bound, and largest replica, of plans that keep every expert on its node.

    Args:
        load: float64 [layers, experts]; order: int64 [layers, experts], heaviest first; expert_home: int64 [layers, experts];
        start: int64 [ranks + 1]; node_of: int64 [ranks], ascending; inverse_speed: float64 [ranks].
    """
    layers, experts = load.shape
    members = np.empty(experts, np.bool_)
    sub_order = np.empty(experts, np.int64)
    count = np.empty(experts, np.int64)
    heap_value = np.empty(start[-1] + 2, np.float64)
    heap_expert = np.empty(start[-1] + 2, np.int64)
    for layer in range(layers):
        bound[layer] = 0.0
        largest[layer] = 0.0
        first = 0
        while first < node_of.size:
            last = first
            while last < node_of.size and node_of[last] == node_of[first]:
                last += 1
            for e in range(experts):
                members[e] = expert_home[layer, e] == node_of[first]
            node_start = start[first : last + 1] - start[first]
            if members.any():
                value, replica = node_value(
                    load[layer],
                    order[layer],
                    1,
                    members,
                    node_start,
                    inverse_speed[first:last],
                    node_start[-1],
                    False,
                    sub_order,
                    count,
                    heap_value,
                    heap_expert,
                )
                bound[layer] = max(bound[layer], value)
                largest[layer] = max(largest[layer], replica)
            first = last


def homes_in_service(
    old: np.ndarray, ranks: Ranks, num_experts: int, num_groups: int
) -> np.ndarray:
    """int64 [layers, experts]: the node that each expert's group is on in a placement in service, int32 [layers, slots].

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
            f"an old placement with group {group[at, slot]} of layer {at} on several nodes: plan with locality node once, then replan"
        )
    return np.repeat(home, size, axis=1)
