"""Hierarchical plans: all experts of a group stay on one node.

Which groups share a node is decided by how well the node's ranks can be balanced, not by the sum of the groups' loads: a light group
with one hot
expert may be the harder one.
"""

import numpy as np

from ...core.errors import PlacementError
from ..arguments import Ranks
from ..fresh.plan import plan_layers
from ..fresh.replicate import largest_replica, order_by_load, replicate_sorted
from ..kernels.bound import busiest_at_least
from ..kernels.compiled import kernel

_MAX_EXACT = 3000  # partitions of the groups up to which all are looked at


@kernel
def node_value(
    load,
    order,
    group_size,
    members,
    start,
    inverse_speed,
    slots,
    thorough,
    sub_order,
    count,
    heap_value,
    heap_expert,
):
    """(lower bound of the busiest rank, largest replica) of a node that holds the groups flagged in `members`."""
    experts = 0
    for k in range(order.size):
        if members[order[k] // group_size]:
            sub_order[experts] = order[k]
            experts += 1
    sub = np.empty(experts, np.float64)
    index = np.arange(experts)
    for k in range(experts):
        sub[k] = load[sub_order[k]]
    used = 0
    for r in range(start.size - 1):
        if start[r + 1] > start[r]:
            used += 1
    head = replicate_sorted(sub, index, slots, used, count[:experts], heap_value, heap_expert)
    largest = largest_replica(sub, index, count, head)
    return busiest_at_least(sub, index, largest, start, inverse_speed, slots, thorough), largest


@kernel
def _measure_node(
    node,
    home,
    load,
    order,
    node_start,
    node_rank,
    node_inverse_speed,
    thorough,
    members,
    sub_order,
    count,
    heap_value,
    heap_expert,
):
    """Lower bound of the busiest rank of one node with the groups that `home`, int64 [groups], gives it; arguments as for `pack_groups`."""
    for g in range(home.size):
        members[g] = home[g] == node
    first = node_rank[node] + node
    last = node_rank[node + 1] + node
    return node_value(
        load,
        order,
        load.size // home.size,
        members,
        node_start[first : last + 1],
        node_inverse_speed[node_rank[node] : node_rank[node + 1]],
        node_start[last],
        thorough,
        sub_order,
        count,
        heap_value,
        heap_expert,
    )[0]


@kernel
def pack_groups(
    load,
    order,
    num_groups,
    capacity,
    node_start,
    node_rank,
    node_inverse_speed,
    exact,
    thorough,
    home,
    value,
):
    """Choose the node of every group, layer by layer, for the lowest in-node lower bound of the busiest node.

    Args:
        load: float64 [layers, experts]; order: int64 [layers, experts], heaviest first; capacity: int64 [nodes], groups a node takes;
        node_start: int64 [ranks + nodes], the first slots of each node's ranks, counted within the node, one list after the other;
        node_rank: int64 [nodes + 1], where each node's list begins; node_inverse_speed: float64 [ranks].
        exact: try every partition (equal nodes only); thorough: use the counting bound.
        home: int64 [layers, groups], written; value: float64 [layers], written: the busiest node's bound.
    """
    layers, experts = load.shape
    nodes = capacity.size
    group_size = experts // num_groups
    members = np.zeros(num_groups, np.bool_)
    sub_order = np.empty(experts, np.int64)
    count = np.empty(experts, np.int64)
    most = 0
    for n in range(nodes):
        most = max(most, node_start[node_rank[n + 1] + n])
    heap_value = np.empty(most + 2, np.float64)
    heap_expert = np.empty(most + 2, np.int64)
    memo_size = (1 << num_groups) if exact else 1
    memo = np.empty(memo_size, np.float64)
    for layer in range(layers):
        w = load[layer]
        memo[:] = -1.0
        sums = np.zeros(num_groups, np.float64)
        for e in range(experts):
            sums[e // group_size] += w[e]
        by_sum = np.argsort(-sums, kind="mergesort")
        # First: heaviest group to the node with least load per speed (LPT).
        node_sum = np.zeros(nodes, np.float64)
        node_count = np.zeros(nodes, np.int64)
        for g in by_sum:
            best_node = -1
            for n in range(nodes):
                if node_count[n] < capacity[n] and (
                    best_node < 0 or node_sum[n] < node_sum[best_node]
                ):
                    best_node = n
            home[layer, g] = best_node
            node_sum[best_node] += sums[g]
            node_count[best_node] += 1
        busiest_of = np.zeros(nodes, np.float64)
        for n in range(nodes):
            busiest_of[n] = _measure_node(
                n,
                home[layer],
                w,
                order[layer],
                node_start,
                node_rank,
                node_inverse_speed,
                thorough,
                members,
                sub_order,
                count,
                heap_value,
                heap_expert,
            )
        if exact:
            # Depth-first over partitions: the first free group, with every choice of companions, fills the next node.
            best = busiest_of.max()
            size = capacity[0]
            full = (1 << num_groups) - 1
            taken = np.zeros(nodes + 1, np.int64)
            chosen = np.zeros(nodes + 1, np.int64)
            chosen[0] = 0
            depth = 0
            while depth >= 0:
                free = full & ~taken[depth]
                lowest = free & -free
                # Next subset of `free` of `size` groups that contains the lowest free one.
                candidate = chosen[depth] + 1 if chosen[depth] else lowest
                found = False
                while candidate <= free:
                    if candidate & free == candidate and candidate & lowest:
                        bits = 0
                        x = candidate
                        while x:
                            x &= x - 1
                            bits += 1
                        if bits == size:
                            found = True
                            break
                    candidate += 1
                if not found:
                    chosen[depth] = 0
                    depth -= 1
                    continue
                chosen[depth] = candidate
                v = memo[candidate]
                if v < 0:
                    for g in range(num_groups):
                        members[g] = (candidate >> g) & 1 == 1
                    v, _ = node_value(
                        w,
                        order[layer],
                        group_size,
                        members,
                        node_start[: node_rank[1] + 1],
                        node_inverse_speed[: node_rank[1]],
                        node_start[node_rank[1]],
                        thorough,
                        sub_order,
                        count,
                        heap_value,
                        heap_expert,
                    )
                    memo[candidate] = v
                if v >= best:
                    continue
                if depth == nodes - 1:
                    best = 0.0
                    for n in range(nodes):
                        best = max(best, memo[chosen[n]])
                        for g in range(num_groups):
                            if (chosen[n] >> g) & 1:
                                home[layer, g] = n
                    continue
                taken[depth + 1] = taken[depth] | candidate
                depth += 1
                chosen[depth] = 0
            value[layer] = best
            continue
        # Too many partitions: swap groups with the busiest node while that lowers the busier of the two.
        for _ in range(4 * num_groups):
            hot = np.argmax(busiest_of)
            best = busiest_of[hot]
            best_a = -1
            best_b = -1
            for a in range(num_groups):
                if home[layer, a] != hot:
                    continue
                for b in range(num_groups):
                    other = home[layer, b]
                    if other == hot or sums[b] >= sums[a]:
                        continue
                    worst = 0.0
                    for side in range(2):
                        node = hot if side == 0 else other
                        for g in range(num_groups):
                            members[g] = home[layer, g] == node
                        members[a] = side == 1
                        members[b] = side == 0
                        first = node_rank[node] + node
                        last = node_rank[node + 1] + node
                        v, _ = node_value(
                            w,
                            order[layer],
                            group_size,
                            members,
                            node_start[first : last + 1],
                            node_inverse_speed[node_rank[node] : node_rank[node + 1]],
                            node_start[last],
                            thorough,
                            sub_order,
                            count,
                            heap_value,
                            heap_expert,
                        )
                        worst = max(worst, v)
                        if worst >= best:
                            break
                    if worst < best:
                        best = worst
                        best_a = a
                        best_b = b
            if best_a < 0:
                break
            other = home[layer, best_b]
            home[layer, best_a] = other
            home[layer, best_b] = hot
            for node in (hot, other):
                busiest_of[node] = _measure_node(
                    node,
                    home[layer],
                    w,
                    order[layer],
                    node_start,
                    node_rank,
                    node_inverse_speed,
                    thorough,
                    members,
                    sub_order,
                    count,
                    heap_value,
                    heap_expert,
                )
        value[layer] = busiest_of.max()


def _capacities(num_groups: int, group_size: int, node_slots: np.ndarray) -> np.ndarray:
    """Groups that each node takes: as even as the nodes' slots allow."""
    room = node_slots // group_size
    if room.sum() < num_groups:
        raise PlacementError(
            f"{num_groups} groups of {group_size} experts do not fit whole on nodes with {node_slots.tolist()} slots: "
            "give more slots, or plan without keeping groups on a node"
        )
    capacity = np.zeros(room.size, np.int64)
    for _ in range(num_groups):
        # The node with most slots per group that it would then hold.
        open_nodes = np.flatnonzero(capacity < room)
        capacity[open_nodes[np.argmax(node_slots[open_nodes] / (capacity[open_nodes] + 1))]] += 1
    return capacity


def _partitions(num_groups: int, size: int) -> float:
    """Ways to divide `num_groups` into unordered sets of `size`."""
    ways, left = 1.0, num_groups
    while left > 0:
        for k in range(size - 1):
            ways *= (left - 1 - k) / (k + 1)
        left -= size
    return ways


def check_groups(num_experts: int, num_groups: int) -> None:
    """Raise PlacementError where the groups are not of equal size."""
    if num_groups < 1 or num_experts % num_groups:
        raise PlacementError(
            f"{num_groups} groups for {num_experts} experts: the groups must be of equal size"
        )


def group_homes(load: np.ndarray, ranks: Ranks, num_groups: int, thorough: bool = False):
    """Node of every group and the lower bound that the choice allows.

    Args:
        load: float64 [layers, experts]; ranks: sorted by node; num_groups: groups of consecutive experts.

    Returns:
        (int64 [layers, groups] node, float64 [layers] time of the busiest rank that no plan with these homes can beat; with equal nodes and
        few enough groups no hierarchical plan at all).

    Raises:
        PlacementError: if the groups do not divide the experts or do not fit whole on the nodes.
    """
    layers, experts = load.shape
    check_groups(experts, num_groups)
    nodes = ranks.num_nodes
    per_rank = np.diff(ranks.start)
    node_slots = np.bincount(ranks.node_of, weights=per_rank, minlength=nodes).astype(np.int64)
    capacity = _capacities(num_groups, experts // num_groups, node_slots)
    node_rank = np.concatenate(
        [[0], np.cumsum(np.bincount(ranks.node_of, minlength=nodes))]
    ).astype(np.int64)
    lists = [np.concatenate([[0], np.cumsum(per_rank[ranks.node_of == n])]) for n in range(nodes)]
    alike = all(
        np.array_equal(lists[0], other)
        and np.array_equal(ranks.speed[ranks.node_of == 0], ranks.speed[ranks.node_of == n])
        for n, other in enumerate(lists)
    )
    exact = (
        alike
        and len(set(capacity.tolist())) == 1
        and num_groups <= 12
        and _partitions(num_groups, int(capacity[0])) <= _MAX_EXACT
    )
    home = np.empty((layers, num_groups), np.int64)
    value = np.empty(layers, np.float64)
    pack_groups(
        load,
        order_by_load(load),
        num_groups,
        capacity,
        np.concatenate(lists).astype(np.int64),
        node_rank,
        ranks.inverse_speed,
        exact,
        thorough,
        home,
        value,
    )
    return home, value


def hierarchical_plan(
    load: np.ndarray, ranks: Ranks, home: np.ndarray, tolerance: float, max_swaps: int, kicks: int
) -> np.ndarray:
    """int32 [layers, slots]: every node planned by itself with the experts of its groups; `home` from `group_homes`."""
    layers, experts = load.shape
    group_size = experts // home.shape[1]
    result = np.empty((layers, ranks.num_slots), np.int32)
    expert_home = np.repeat(home, group_size, axis=1)
    by_node = np.argsort(expert_home, axis=1, kind="stable")
    first_expert = 0
    for n in range(ranks.num_nodes):
        here = np.flatnonzero(ranks.node_of == n)
        first_slot, last_slot = int(ranks.start[here[0]]), int(ranks.start[here[-1] + 1])
        if first_slot == last_slot:
            continue
        num_experts = int((expert_home[0] == n).sum())
        members = np.ascontiguousarray(by_node[:, first_expert : first_expert + num_experts])
        first_expert += num_experts
        sub = np.ascontiguousarray(np.take_along_axis(load, members, axis=1))
        local = np.empty((layers, last_slot - first_slot), np.int32)
        start = ranks.start[here[0] : here[-1] + 2] - first_slot
        if num_experts == 0:
            raise PlacementError(
                f"node {n} has {last_slot - first_slot} slots and no group to fill them: use fewer nodes than groups"
            )
        plan_layers(
            sub,
            order_by_load(sub),
            start,
            ranks.rank_of[first_slot:last_slot] - here[0],
            ranks.slowness[here],
            ranks.inverse_speed[here],
            tolerance,
            max_swaps,
            kicks,
            0,
            local,
        )
        result[:, first_slot:last_slot] = np.take_along_axis(
            members, local.astype(np.int64), axis=1
        )
    return result
