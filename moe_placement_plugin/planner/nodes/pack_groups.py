"""Choose the node of every group by how well the node's ranks can be balanced.

Not by the sum of the groups' loads: a light group with one hot expert may be the harder one.
"""

from typing import NamedTuple

import numpy as np

from ..fresh.replicate import largest_replica, replicate_sorted
from ..kernels.bound import busiest_at_least
from ..kernels.compiled import inner_kernel, kernel
from ..kernels.layer import ranks_in_use, sort_descending


class Nodes(NamedTuple):
    """Describe nodes that groups are dealt to.

    Attributes:
        capacity: int64 [nodes], groups that a node takes.
        first_rank: int64 [nodes + 1], the first rank of each node.
        start: int64 [ranks + nodes], the first slots of each node's ranks and their end, counted
            within the node, one list after the other.
        inverse_speed: float64 [ranks].
    """

    capacity: np.ndarray
    first_rank: np.ndarray
    start: np.ndarray
    inverse_speed: np.ndarray


class GroupedLayer(NamedTuple):
    """Hold one layer of groups that are dealt to nodes.

    Attributes:
        load: float64 [experts].
        order: int64 [experts], heaviest first.
        sums: float64 [groups].
        home: int64 [groups], node of each group.
    """

    load: np.ndarray
    order: np.ndarray
    sums: np.ndarray
    home: np.ndarray


class NodeScratch(NamedTuple):
    """Hold what the valuation of a node works with.

    Attributes:
        members: bool [groups], those on the node.
        order: int64 [experts].
        replicas: int64 [experts].
        heap_value: float64 [most slots of a node, and some].
        heap_expert: int64, as long.
    """

    members: np.ndarray
    order: np.ndarray
    replicas: np.ndarray
    heap_value: np.ndarray
    heap_expert: np.ndarray


@inner_kernel(makes_arrays=True)
def make_scratch(groups, experts, slots):
    """Return scratch for nodes of that many slots at most."""
    return NodeScratch(
        np.zeros(groups, np.bool_),
        np.empty(experts, np.int64),
        np.empty(experts, np.int64),
        np.empty(slots + 2, np.float64),
        np.empty(slots + 2, np.int64),
    )


@inner_kernel(makes_arrays=True)
def node_value(load, order, start, inverse_speed, thorough, scratch):
    """Bound what a node can be balanced to with the groups that are flagged in the scratch.

    Args:
        load: float64 [experts].
        order: int64 [experts], heaviest first.
        start: int64 [ranks of the node + 1], counted within the node.
        inverse_speed: float64 [ranks of the node].
        thorough: whether to use the counting bound.
        scratch: `NodeScratch`.

    Returns:
        (lower bound of the busiest rank, largest replica), float64.
    """
    members, sub_order, replicas, heap_value, heap_expert = scratch
    group_size = load.size // members.size
    experts = 0
    for k in range(order.size):
        if members[order[k] // group_size]:
            sub_order[experts] = order[k]
            experts += 1
    sub = np.empty(experts, np.float64)
    index = np.arange(experts)
    for k in range(experts):
        sub[k] = load[sub_order[k]]
    used = ranks_in_use(start)
    count = replicas[:experts]
    slots = start[start.size - 1]
    head = replicate_sorted(sub, index, slots, used, count, heap_value, heap_expert)
    largest = largest_replica(sub, index, count, head)
    return busiest_at_least(sub, index, largest, start, inverse_speed, thorough), largest


@inner_kernel
def _value_members(layer, nodes, node, thorough, scratch):
    """Return the lower bound of a node with the groups that are flagged in the scratch."""
    first = nodes.first_rank[node]
    last = nodes.first_rank[node + 1]
    return node_value(
        layer.load,
        layer.order,
        nodes.start[first + node : last + node + 1],
        nodes.inverse_speed[first:last],
        thorough,
        scratch,
    )[0]


@inner_kernel
def _value_at_home(layer, nodes, node, thorough, scratch):
    """Return the lower bound of a node with the groups that are at home there."""
    members = scratch.members
    for g in range(members.size):
        members[g] = layer.home[g] == node
    return _value_members(layer, nodes, node, thorough, scratch)


@inner_kernel
def _value_swapped(layer, nodes, a, b, best, thorough, scratch):
    """Return the lower bound of the busier of two nodes after they exchanged groups `a` and `b`.

    The first node is looked at alone where it is not below `best` any more.
    """
    home = layer.home
    members = scratch.members
    worst = 0.0
    for side in range(2):
        node = home[a] if side == 0 else home[b]
        for g in range(members.size):
            members[g] = home[g] == node
        members[a] = side == 1
        members[b] = side == 0
        worst = max(worst, _value_members(layer, nodes, node, thorough, scratch))
        if worst >= best:
            break
    return worst


@inner_kernel(makes_arrays=True)
def _deal_groups(layer, capacity):
    """Write the home of every group: the heaviest to the node with the least load (LPT)."""
    node_sum = np.zeros(capacity.size, np.float64)
    node_count = np.zeros(capacity.size, np.int64)
    by_sum = np.arange(layer.sums.size)
    sort_descending(by_sum, layer.sums)
    for k in range(by_sum.size):
        g = by_sum[k]
        best = -1
        for n in range(capacity.size):
            if node_count[n] < capacity[n] and (best < 0 or node_sum[n] < node_sum[best]):
                best = n
        layer.home[g] = best
        node_sum[best] += layer.sums[g]
        node_count[best] += 1


@inner_kernel
def _next_subset(previous, free, size):
    """Find the next set of groups that contains the lowest free one, as bits; 0 for none.

    Args:
        previous: the set before, 0 at first.
        free: the groups to choose from.
        size: how many to choose.
    """
    lowest = free & -free
    candidate = previous + 1 if previous else lowest
    while candidate <= free:
        if candidate & free == candidate and candidate & lowest:
            bits = 0
            x = candidate
            while x:
                x &= x - 1
                bits += 1
            if bits == size:
                return candidate
        candidate += 1
    return np.int64(0)


@inner_kernel(makes_arrays=True)
def _try_partitions(layer, nodes, thorough, best, memo, scratch):
    """Write the best home of every group among all partitions, for equal nodes.

    Depth-first: the first free group, with every choice of companions, fills the next node.

    Args:
        layer: `GroupedLayer`, updated where a partition is better.
        nodes: `Nodes`.
        thorough: whether to use the counting bound.
        best: float64, the busiest node's bound that is to be beaten.
        memo: float64 [2**groups], scratch.
        scratch: `NodeScratch`.

    Returns:
        The busiest node's bound.
    """
    home = layer.home
    members = scratch.members
    depth_of_last = nodes.capacity.size - 1
    full = (1 << home.size) - 1
    taken = np.zeros(nodes.capacity.size, np.int64)
    chosen = np.zeros(nodes.capacity.size, np.int64)
    memo[:] = -1.0
    depth = 0
    while depth >= 0:
        chosen[depth] = _next_subset(chosen[depth], full & ~taken[depth], nodes.capacity[0])
        candidate = chosen[depth]
        if candidate == 0:
            depth -= 1
            continue
        if memo[candidate] < 0:
            for g in range(home.size):
                members[g] = (candidate >> g) & 1 == 1
            memo[candidate] = _value_members(layer, nodes, np.int64(0), thorough, scratch)
        if memo[candidate] >= best:
            continue
        if depth < depth_of_last:
            taken[depth + 1] = taken[depth] | candidate
            depth += 1
            chosen[depth] = 0
            continue
        best = 0.0
        for n in range(chosen.size):
            best = max(best, memo[chosen[n]])
            for g in range(home.size):
                if (chosen[n] >> g) & 1:
                    home[g] = n
    return best


@inner_kernel
def _swap_groups(layer, nodes, thorough, busiest_of, scratch):
    """Swap groups with the busiest node while that lowers the busier of the two nodes.

    Args:
        layer: `GroupedLayer`, updated.
        nodes: `Nodes`.
        thorough: whether to use the counting bound.
        busiest_of: float64 [nodes], the bound of each, updated.
        scratch: `NodeScratch`.
    """
    home = layer.home
    sums = layer.sums
    for _ in range(4 * home.size):
        hot = np.argmax(busiest_of)
        best = busiest_of[hot]
        best_a = -1
        best_b = -1
        for a in range(home.size):
            if home[a] != hot:
                continue
            for b in range(home.size):
                if home[b] == hot or sums[b] >= sums[a]:
                    continue
                worst = _value_swapped(layer, nodes, a, b, best, thorough, scratch)
                if worst < best:
                    best = worst
                    best_a = a
                    best_b = b
        if best_a < 0:
            return
        other = home[best_b]
        home[best_a] = other
        home[best_b] = hot
        for node in (hot, other):
            busiest_of[node] = _value_at_home(layer, nodes, node, thorough, scratch)


@kernel
def pack_groups(load, order, nodes, exact, thorough, home, value):
    """Choose the node of every group for the lowest lower bound of the busiest node.

    Args:
        load: float64 [layers, experts].
        order: int64 [layers, experts], heaviest first.
        nodes: `Nodes`.
        exact: try every partition (equal nodes only), else swap groups.
        thorough: use the counting bound.
        home: int64 [layers, groups], written.
        value: float64 [layers], written: the busiest node's bound.
    """
    layers, experts = load.shape
    groups = home.shape[1]
    most = np.int64(0)
    for n in range(nodes.capacity.size):
        most = max(most, nodes.start[nodes.first_rank[n + 1] + n])
    scratch = make_scratch(groups, experts, most)
    memo = np.empty((1 << groups) if exact else 1, np.float64)
    sums = np.empty(groups, np.float64)
    busiest_of = np.empty(nodes.capacity.size, np.float64)
    for row in range(layers):
        layer = GroupedLayer(load[row], order[row], sums, home[row])
        sums[:] = 0.0
        for e in range(experts):
            sums[e // (experts // groups)] += layer.load[e]
        _deal_groups(layer, nodes.capacity)
        for n in range(nodes.capacity.size):
            busiest_of[n] = _value_at_home(layer, nodes, n, thorough, scratch)
        if exact:
            value[row] = _try_partitions(layer, nodes, thorough, busiest_of.max(), memo, scratch)
        else:
            _swap_groups(layer, nodes, thorough, busiest_of, scratch)
            value[row] = busiest_of.max()
