"""The planner over the tables that both engines' EPLB keep: equally many slots on every rank, one row for each layer.

Importing this compiles nothing yet, but loads numba, which must not happen before a worker of vLLM's CPU build has begun.
"""

from __future__ import annotations

import numpy as np

from ..core.errors import PlacementError
from ..planner import plan, replan

REGROUP_GAIN = 0.05
"""Groups change nodes, for which almost every slot has to be fetched, where that raises balancedness by more than this fraction."""


def rebalance_table(
    load,
    num_replicas,
    num_groups,
    num_nodes,
    num_ranks,
    old=None,
    max_moves=None,
    node_of_rank=None,
) -> np.ndarray:
    """`rebalance_experts` over numpy arrays, with at most `max_moves` slots that change rank; int32 [layers, num_replicas].

    ``node_of_rank`` int [ranks] is what the ranks said themselves; without it equal runs of ranks are taken to share a node.
    """
    slots = even_slots_or_raise(num_replicas, num_ranks)
    hierarchical = num_nodes > 1 and num_groups % num_nodes == 0
    if old is not None and not _in_service(old, load.shape, num_replicas):
        old = None
    if not hierarchical:
        return (
            plan(load, slots) if old is None else replan(load, old, slots, max_moves=max_moves)
        ).physical_to_logical
    if node_of_rank is None or len(set(node_of_rank)) != num_nodes:
        node_of_rank = np.arange(num_ranks) // max(1, num_ranks // num_nodes)
    where = {"node_of_rank": np.asarray(node_of_rank), "num_groups": num_groups, "locality": "node"}
    fresh = plan(load, slots, old=old, **where)
    if old is None:
        return fresh.physical_to_logical
    try:
        kept = replan(load, old, slots, max_moves=max_moves, **where)
    except (
        PlacementError
    ):  # a group lies on several nodes, as where the engine has just started: bring it together
        return fresh.physical_to_logical
    regroup = max_moves is None and fresh.overall > (1 + REGROUP_GAIN) * kept.overall
    return (fresh if regroup else kept).physical_to_logical


def even_slots_or_raise(num_replicas: int, num_ranks: int) -> np.ndarray:
    """int64 [ranks]: the slots of each rank.

    Raises:
        PlacementError: if the physical experts do not divide over the ranks.
    """
    if num_ranks < 1 or num_replicas % num_ranks:
        raise PlacementError(
            f"{num_replicas} physical experts on {num_ranks} ranks: the engine gives every rank as many; "
            "change the number of redundant experts so that they divide"
        )
    return np.full(num_ranks, num_replicas // num_ranks, np.int64)


def _in_service(old: np.ndarray, load_shape: tuple[int, int], num_replicas: int) -> bool:
    """Whether `old` is a whole placement of this size; during elastic scaling it may not be."""
    layers, experts = load_shape
    if old.shape != (layers, num_replicas) or old.min() < 0 or old.max() >= experts:
        return False
    held = np.zeros((layers, experts), bool)
    np.put_along_axis(held, old.astype(np.int64), True, axis=1)
    return bool(held.all())


def inverse_maps(
    table: np.ndarray, num_experts: int, usable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(logical to physical, int64 [layers, experts, most replicas] padded with -1; replicas, int64 [layers, experts]).

    Args:
        table: int [layers, slots].
        num_experts: logical experts.
        usable: bool [slots] or [layers, slots], False for slots that no token may go to; all when left out.
    """
    layers, slots = table.shape
    experts = table.astype(np.int64)
    if usable is not None:
        experts = np.where(usable, experts, num_experts)  # beyond the last one
    count = np.zeros((layers, num_experts + 1), np.int64)
    np.add.at(count, (np.arange(layers)[:, None], experts), 1)
    order = np.argsort(experts, axis=1, kind="stable")
    sorted_experts = np.take_along_axis(experts, order, axis=1)
    first = np.cumsum(count, axis=1) - count
    nth = np.arange(slots) - np.take_along_axis(first, sorted_experts, axis=1)
    to_physical = np.full((layers, num_experts + 1, int(count.max())), -1, np.int64)
    to_physical[np.arange(layers)[:, None], sorted_experts, nth] = order
    count = count[:, :num_experts]
    return np.ascontiguousarray(to_physical[:, :num_experts, : int(count.max())]), count


def warm_up(table: np.ndarray, num_experts: int, num_ranks: int, plans: bool = True) -> None:
    """Compile planner and exchange; else the first rebalance on a machine stalls the server for that long (about 15 s).

    Args:
        table: int ``[layers, slots]``, a placement.
        num_experts: logical experts.
        num_ranks: EP ranks.
        plans: whether this package's planner rebalances; else the exchange only.
    """
    from ..core.placement import Placement  # lazy: heavy
    from ..exchange.plan import plan_exchange  # lazy: heavy

    if plans:
        load = np.tile(1.0 + np.arange(num_experts), (table.shape[0], 1))
        rebalance_table(load, table.shape[1], 1, 1, num_ranks, table)
    slots = (table.shape[1] // num_ranks,) * num_ranks
    here, there = (
        Placement(t, num_experts, slots) for t in (table, np.roll(table, slots[0], axis=1))
    )
    plan_exchange(here, there).chunks()
