"""Plan from nothing: replicate, pack, refine, layer by layer."""

import numpy as np

from ..kernels.bound import busiest_at_least
from ..kernels.compiled import kernel
from ..kernels.layer import ranks_in_use, scale_load, sum_of
from ..kernels.state import LayerState, Ranks, SearchLimits
from .pack import make_queue, pack_any, pack_lpt
from .refine import refine
from .replicate import largest_replica, order_by_load, replicate_sorted, sort_items
from .swaps import swap_hot_cold


@kernel
def plan_layers(load, order, ranks, limits, table):
    """Plan every layer for one load.

    Args:
        load: float64 [layers, experts].
        order: int64 [layers, experts], see `order_by_load`.
        ranks: `Ranks`.
        limits: `SearchLimits`.
        table: int32 [layers, slots], written: the expert of each slot.
    """
    layers, experts = load.shape
    slots = table.shape[1]
    start = ranks.start
    slowness = ranks.slowness
    inverse_speed = ranks.inverse_speed
    tolerance, max_swaps, kicks = limits
    used = ranks_in_use(start)
    equal = slowness.max() == 1
    replicas = np.empty(experts, np.int64)
    item_expert = np.empty(experts, np.int64)
    item_load = np.empty(experts, np.float64)
    rank_load = np.empty(slowness.size, np.float64)
    share_of = np.empty(slots, np.float64)
    queue = make_queue(slowness.size, slots)
    scaled = np.empty(experts, np.int64)
    for layer in range(layers):
        expert_of = table[layer]
        w = load[layer]
        state = LayerState(w, replicas, expert_of, share_of, rank_load)
        head = replicate_sorted(w, order[layer], slots, used, replicas, queue.load, queue.rank)
        largest = 0.0
        if kicks >= 0 or not equal:
            largest = largest_replica(w, order[layer], replicas, head)
        packed = False
        if equal:
            sort_items(w, order[layer], replicas, head, item_expert, item_load)
            packed = pack_lpt(item_expert, item_load, start, state, queue)
        if not packed:
            pack_any(w, order[layer], replicas, start, inverse_speed, expert_of)
        total = sum_of(rank_load) if packed else sum_of(w)
        if total <= 0.0:
            continue
        if packed:
            swap_hot_cold(state, start, max_swaps, total / used * (1.0 + tolerance))
        if kicks < 0 and packed:
            continue
        bound = busiest_at_least(w, order[layer], largest, start, inverse_speed, kicks > 0)
        scale = scale_load(w, total, scaled)
        # Time in the integer unit: slowness 1 stands for an inverse speed of 1 where all ranks are
        # equal, else for `unit`.
        unit = 1.0 if equal else slowness.max() / inverse_speed.max()
        target = np.int64(bound * scale * unit * (1.0 + tolerance))
        refine(scaled, replicas, expert_of, ranks, target, kicks, layer)


def fresh_plan(load: np.ndarray, ranks: Ranks, limits: SearchLimits) -> np.ndarray:
    """Plan for one load, float64 [layers, experts]; return the expert of each slot as int32."""
    table = np.empty((load.shape[0], ranks.num_slots), np.int32)
    plan_layers(load, order_by_load(load), ranks, limits, table)
    return table
