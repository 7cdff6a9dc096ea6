"""Decide how many replicas each expert gets.

Giving every extra slot to the expert whose replicas are heaviest is optimal for the largest replica
(DeepSeek EPLB, `replicate_experts`; the same greedy is the Jefferson apportionment). Here it runs
over loads that are already sorted, so that only the head of the list and a small heap of the
experts replicated so far are looked at: O(extra log extra) per layer.
"""

import numpy as np

from ..kernels.compiled import inner_kernel

_INDEX_BITS = 12  # low bits of a sort key that carry the expert; the load keeps 40 bits of mantissa
MAX_EXPERTS = 1 << _INDEX_BITS


def order_by_load(load: np.ndarray) -> np.ndarray:
    """Order the experts of each layer, the heaviest first; ties go to the lower index.

    Args:
        load: float64 [layers, experts], non-negative.

    Returns:
        int64 [layers, experts] of expert indices.
    """
    # One call of numpy's vectorised integer sort over all layers is several times faster than
    # sorting inside a compiled loop. A non-negative float64 orders as its own bits do, so that the
    # expert's index can ride in the low bits.
    experts = load.shape[1]
    mask = np.int64(MAX_EXPERTS - 1)
    keys = load.view(np.int64) & ~mask
    keys |= np.arange(experts - 1, -1, -1, dtype=np.int64)
    keys.sort(axis=1)
    keys &= mask
    np.subtract(experts - 1, keys, out=keys)
    return np.ascontiguousarray(keys[:, ::-1])


@inner_kernel
def replicate_sorted(load, order, num_slots, max_replicas, replicas, heap_value, heap_expert):
    """Choose replica counts that minimise the largest replica of one layer.

    Args:
        load: float64 [experts].
        order: int64 [experts], experts from the heaviest to the lightest.
        num_slots: slots to fill, at least `experts`.
        max_replicas: replicas an expert may have at most (the number of ranks that have slots).
        replicas: int64 [experts], written.
        heap_value: float64, scratch of at least `num_slots - experts + 1` entries.
        heap_expert: int64, scratch as long.

    Returns:
        The number of leading experts of `order` that have more than one replica.
    """
    experts = order.size
    replicas[:] = 1
    extra = num_slots - experts
    if extra <= 0 or max_replicas <= 1:
        return 0
    size = 0
    head = 0
    while extra > 0:
        if head < experts and (size == 0 or load[order[head]] >= heap_value[0]):
            e = order[head]
            head += 1
            replicas[e] = 2
            if max_replicas > 2:
                i = size
                size += 1
                v = load[e] * 0.5
                while i > 0:
                    parent = (i - 1) >> 1
                    if heap_value[parent] >= v:
                        break
                    heap_value[i] = heap_value[parent]
                    heap_expert[i] = heap_expert[parent]
                    i = parent
                heap_value[i] = v
                heap_expert[i] = e
        elif size > 0:
            e = heap_expert[0]
            replicas[e] += 1
            if replicas[e] < max_replicas:
                v = load[e] / replicas[e]
                x = e
            else:
                size -= 1
                v = heap_value[size]
                x = heap_expert[size]
            if size > 0:
                i = 0
                while True:
                    child = 2 * i + 1
                    if child >= size:
                        break
                    if child + 1 < size and heap_value[child + 1] > heap_value[child]:
                        child += 1
                    if heap_value[child] <= v:
                        break
                    heap_value[i] = heap_value[child]
                    heap_expert[i] = heap_expert[child]
                    i = child
                heap_value[i] = v
                heap_expert[i] = x
        else:
            # Every expert is on every rank: the slots that are left hold unavoidable duplicates.
            break
        extra -= 1
    return head


@inner_kernel
def largest_replica(load, order, replicas, replicated):
    """Return the load of the heaviest replica, float64; arguments as for `sort_items`."""
    largest = 0.0
    for k in range(min(replicated + 1, order.size)):
        e = order[k]
        largest = max(largest, load[e] / replicas[e])
    return largest


@inner_kernel
def sort_items(load, order, replicas, replicated, item_expert, item_load):
    """Order experts by the load of one replica, heaviest first.

    Args:
        load: float64 [experts].
        order: int64 [experts], heaviest expert first.
        replicas: int64 [experts].
        replicated: how many experts at the head of `order` have several, from `replicate_sorted`.
        item_expert: int64 [experts], written.
        item_load: float64 [experts], written.
    """
    experts = order.size
    # The head: insertion sort of the few replicated experts.
    for k in range(replicated):
        e = order[k]
        v = load[e] / replicas[e]
        i = k
        while i > 0 and item_load[i - 1] < v:
            item_load[i] = item_load[i - 1]
            item_expert[i] = item_expert[i - 1]
            i -= 1
        item_load[i] = v
        item_expert[i] = e
    # Merge with the tail, order[replicated:], from the back: the head occupies [0, replicated).
    a = replicated - 1
    b = experts - 1
    out = experts - 1
    while a >= 0:
        if b >= replicated and load[order[b]] < item_load[a]:
            item_expert[out] = order[b]
            item_load[out] = load[order[b]]
            b -= 1
        else:
            item_expert[out] = item_expert[a]
            item_load[out] = item_load[a]
            a -= 1
        out -= 1
    while b >= replicated:
        item_expert[out] = order[b]
        item_load[out] = load[order[b]]
        b -= 1
        out -= 1
