"""Plan as DeepSeek's expert load balancer does: the reference that every planner is compared with.

Written from its description: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.4, and the
README of deepseek-ai/EPLB. Three greedy steps: expert groups are packed onto nodes so that nodes
get equal load; within a node the most loaded experts get the redundant slots one by one; replicas
are packed onto the node's GPUs. Packing goes from the heaviest item to the lightest, each to the
lightest bin that still has room.
"""

from __future__ import annotations

import heapq

import numpy as np


def pack(weights: np.ndarray, num_bins: int) -> list[list[int]]:
    """Pack items into bins: the heaviest first, to the lightest bin that has room.

    Args:
        weights: [items].
        num_bins: every bin gets as many items.

    Returns:
        Items of each bin.
    """
    room = len(weights) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b) for b in range(num_bins)]
    for item in np.argsort(-weights, kind="stable"):
        weight, b = heapq.heappop(heap)
        bins[b].append(int(item))
        if len(bins[b]) < room:
            heapq.heappush(heap, (weight + float(weights[item]), b))
    return bins


def replicate(weights: np.ndarray, num_slots: int) -> list[int]:
    """Give every expert a slot, then each further one to the expert whose replicas carry most.

    Args:
        weights: [experts].
        num_slots: in all.

    Returns:
        The expert of each slot.
    """
    count = [1] * len(weights)
    replicas = list(range(len(weights)))
    heap = [(-float(w), e) for e, w in enumerate(weights)]
    heapq.heapify(heap)
    for _ in range(num_slots - len(weights)):
        _, e = heapq.heappop(heap)
        count[e] += 1
        replicas.append(e)
        heapq.heappush(heap, (-float(weights[e]) / count[e], e))
    return replicas


def rebalance(
    load: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> np.ndarray:
    """Place the experts of every layer.

    Args:
        load: [layers, experts].
        num_slots: per layer.
        num_groups: of experts; hierarchical if they divide over the nodes, else flat.
        num_nodes: how many.
        num_ranks: a divisor of `num_slots`.

    Returns:
        int64 [layers, slots].
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    layers, experts = load.shape
    size = experts // num_groups
    table = []
    for weights in load.astype(np.float64):
        row: list[int] = []
        for groups in pack(weights.reshape(num_groups, size).sum(axis=1), num_nodes):
            members = np.concatenate([np.arange(g * size, (g + 1) * size) for g in groups])
            replicas = np.array(replicate(weights[members], num_slots // num_nodes))
            share = (weights[members] / np.bincount(replicas))[replicas]
            replicas = members[replicas]
            for rank in pack(share, num_ranks // num_nodes):
                row.extend(int(replicas[i]) for i in rank)
        table.append(row)
    return np.array(table, dtype=np.int64)
