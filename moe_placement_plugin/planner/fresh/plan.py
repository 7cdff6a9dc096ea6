"""A plan from nothing: replicate, pack, refine, layer by layer."""

import numpy as np

from ..kernels.bound import busiest_at_least
from ..kernels.compiled import kernel
from ..kernels.layer import scale_load, sum_of
from .pack import pack_any, pack_lpt
from .refine import refine, swap_hot_cold
from .replicate import largest_replica, order_by_load, replicate_sorted, sorted_items


@kernel
def plan_layers(
    load, order, start, rank_of, slowness, inverse_speed, tolerance, max_swaps, kicks, seed, result
):
    """Plan every layer for one load.

    Args:
        load: float64 [layers, experts]; order: int64 [layers, experts], see `order_by_load`.
        start: int64 [ranks + 1], first slot of each rank; rank_of: int64 [slots].
        slowness: int64 [ranks], inverse_speed: float64 [ranks], see `Ranks`.
        tolerance: a layer is done when its busiest rank is within this fraction of the lower bound.
        max_swaps: of the quick refinement; kicks: of the thorough one; if negative it is left out for ranks of equal speed; seed: of the
        kicks.
        result: int32 [layers, slots], written: the expert of each slot.
    """
    layers, experts = load.shape
    slots = result.shape[1]
    ranks = start.size - 1
    used = 0
    equal = True
    for r in range(ranks):
        if start[r + 1] > start[r]:
            used += 1
        equal = equal and slowness[r] == 1
    count = np.empty(experts, np.int64)
    item_expert = np.empty(experts, np.int64)
    item_load = np.empty(experts, np.float64)
    rank_load = np.empty(ranks, np.float64)
    share_of = np.empty(slots, np.float64)
    queue_load = np.empty(ranks + 2 * slots + 2, np.float64)
    queue_rank = np.empty(ranks + 2 * slots + 2, np.int64)
    next_slot = np.empty(ranks, np.int64)
    sorted_load = np.empty(ranks, np.float64)
    sorted_rank = np.empty(ranks, np.int64)
    seen = np.empty(ranks, np.int64)
    scaled = np.empty(experts, np.int64)
    for layer in range(layers):
        expert_of = result[layer]
        w = load[layer]
        head = replicate_sorted(w, order[layer], slots, used, count, queue_load, queue_rank)
        largest = 0.0
        if kicks >= 0 or not equal:
            largest = largest_replica(w, order[layer], count, head)
        packed = False
        if equal:
            sorted_items(w, order[layer], count, head, item_expert, item_load)
            packed = pack_lpt(
                item_expert,
                item_load,
                count,
                start,
                expert_of,
                share_of,
                rank_load,
                queue_load,
                queue_rank,
                next_slot,
                sorted_load,
                sorted_rank,
                seen,
            )
        if not packed:
            pack_any(w, count, start, inverse_speed, expert_of)
        total = 0.0
        if packed:
            for r in range(ranks):
                total += rank_load[r]
        else:
            total = sum_of(w)
        if total <= 0.0:
            continue
        if packed:
            swap_hot_cold(
                count,
                start,
                expert_of,
                share_of,
                rank_load,
                max_swaps,
                total / used * (1.0 + tolerance),
            )
        if kicks < 0 and packed:
            continue
        bound = busiest_at_least(w, order[layer], largest, start, inverse_speed, slots, kicks > 0)
        scale = scale_load(w, total, scaled)
        # Time in the integer unit: slowness 1 stands for an inverse speed of 1 where all ranks are equal, else for `unit`.
        unit = 1.0 if equal else slowness.max() / inverse_speed.max()
        target = np.int64(bound * scale * unit * (1.0 + tolerance))
        refine(
            scaled,
            count,
            start,
            rank_of,
            0,
            ranks,
            slowness,
            expert_of,
            target,
            kicks,
            seed + layer,
        )


def fresh_plan(
    load: np.ndarray, ranks, tolerance: float, max_swaps: int, kicks: int, seed: int = 0
) -> np.ndarray:
    """int32 [layers, slots]: the expert of each slot, for one load float64 [layers, experts]; `ranks` as `Ranks`."""
    result = np.empty((load.shape[0], ranks.num_slots), np.int32)
    plan_layers(
        load,
        order_by_load(load),
        ranks.start,
        ranks.rank_of,
        ranks.slowness,
        ranks.inverse_speed,
        tolerance,
        max_swaps,
        kicks,
        seed,
        result,
    )
    return result
