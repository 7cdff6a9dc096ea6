"""Make hierarchical plans: all experts of a group stay on one node."""

from __future__ import annotations

import numpy as np

from ...core.errors import PlacementError
from ..fresh.plan import fresh_plan
from ..fresh.replicate import order_by_load
from ..kernels.state import Ranks, SearchLimits, make_ranks
from .pack_groups import Nodes, pack_groups

_MAX_EXACT = 3000
"""Partitions of the groups up to which all are looked at."""


def _capacities(num_groups: int, group_size: int, node_slots: np.ndarray) -> np.ndarray:
    """Return the groups that each node takes, int64 [nodes]: as even as its slots allow.

    Args:
        num_groups: groups in all.
        group_size: experts of each.
        node_slots: int64 [nodes].
    """
    room = node_slots // group_size
    if room.sum() < num_groups:
        raise PlacementError(
            f"{num_groups} groups of {group_size} experts do not fit whole on nodes with "
            f"{node_slots.tolist()} slots: give more slots, or plan without keeping groups on a "
            "node"
        )
    capacity = np.zeros(room.size, np.int64)
    for _ in range(num_groups):
        # The node with most slots per group that it would then hold.
        open_nodes = np.flatnonzero(capacity < room)
        capacity[open_nodes[np.argmax(node_slots[open_nodes] / (capacity[open_nodes] + 1))]] += 1
    return capacity


def _count_partitions(num_groups: int, size: int) -> float:
    """Count the ways to divide groups into unordered sets of `size`."""
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


def _describe_nodes(ranks: Ranks, num_groups: int, num_experts: int) -> tuple[Nodes, bool]:
    """Return the nodes that groups are dealt to, and whether all are alike."""
    nodes = range(ranks.num_nodes)
    slots = [ranks.slots_per_rank[ranks.node_of == n] for n in nodes]
    speeds = [ranks.speed[ranks.node_of == n] for n in nodes]
    node_slots = np.array([widths.sum() for widths in slots], np.int64)
    capacity = _capacities(num_groups, num_experts // num_groups, node_slots)
    alike = len(set(capacity.tolist())) == 1 and all(
        np.array_equal(slots[0], slots[n]) and np.array_equal(speeds[0], speeds[n]) for n in nodes
    )
    first_rank = np.concatenate([[0], np.cumsum([widths.size for widths in slots])])
    start = np.concatenate([np.concatenate([[0], np.cumsum(widths)]) for widths in slots])
    return (
        Nodes(capacity, first_rank.astype(np.int64), start.astype(np.int64), ranks.inverse_speed),
        alike,
    )


def group_homes(
    load: np.ndarray, ranks: Ranks, num_groups: int, thorough: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the node of every group, and bound what that choice allows.

    Args:
        load: float64 [layers, experts].
        ranks: sorted by node.
        num_groups: groups of consecutive experts.
        thorough: whether to use the counting bound.

    Returns:
        (int64 [layers, groups] node, float64 [layers] time of the busiest rank that no plan with
        these homes can beat; with equal nodes and few enough groups no hierarchical plan at all).

    Raises:
        PlacementError: if the groups do not divide the experts or do not fit whole on the nodes.
    """
    layers, experts = load.shape
    check_groups(experts, num_groups)
    nodes, alike = _describe_nodes(ranks, num_groups, experts)
    exact = (
        alike
        and num_groups <= 12
        and _count_partitions(num_groups, int(nodes.capacity[0])) <= _MAX_EXACT
    )
    home = np.empty((layers, num_groups), np.int64)
    value = np.empty(layers, np.float64)
    pack_groups(load, order_by_load(load), nodes, exact, thorough, home, value)
    return home, value


def _ranks_of_node(ranks: Ranks, node: int) -> Ranks:
    """Return the ranks of one node, sorted by node as they are, as ranks of their own."""
    here = ranks.node_of == node
    return make_ranks(
        ranks.slots_per_rank[here], ranks.node_of[here], ranks.speed[here], ranks.slowness[here]
    )


def hierarchical_plan(
    load: np.ndarray, ranks: Ranks, home: np.ndarray, limits: SearchLimits
) -> np.ndarray:
    """Plan every node by itself with the experts of its groups.

    Args:
        load: float64 [layers, experts].
        ranks: sorted by node.
        home: int64 [layers, groups], see `group_homes`.
        limits: of the search.

    Returns:
        int32 [layers, slots].

    Raises:
        PlacementError: if a node has slots and no group.
    """
    layers, experts = load.shape
    table = np.empty((layers, ranks.num_slots), np.int32)
    expert_home = np.repeat(home, experts // home.shape[1], axis=1)
    by_node = np.argsort(expert_home, axis=1, kind="stable")
    first_expert = first_slot = 0
    for n in range(ranks.num_nodes):
        node_ranks = _ranks_of_node(ranks, n)
        slots = node_ranks.num_slots
        if slots == 0:
            continue
        num_experts = int((expert_home[0] == n).sum())
        if num_experts == 0:
            raise PlacementError(
                f"node {n} has {slots} slots and no group to fill them: use fewer nodes than groups"
            )
        members = np.ascontiguousarray(by_node[:, first_expert : first_expert + num_experts])
        node_load = np.ascontiguousarray(np.take_along_axis(load, members, axis=1))
        local = fresh_plan(node_load, node_ranks, limits)
        table[:, first_slot : first_slot + slots] = np.take_along_axis(
            members, local.astype(np.int64), axis=1
        )
        first_expert += num_experts
        first_slot += slots
    return table
