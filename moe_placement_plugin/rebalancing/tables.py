"""Plan over the tables of both engines' EPLB, with as many slots on every rank.

A table has one row for each layer. Importing this loads no numba, which must not happen before a
worker of vLLM's CPU build has begun; planning does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import PlacementError
from ..core.placement import Placement
from ..exchange.plan import plan_exchange

REGROUP_GAIN = 0.05
"""Groups change nodes where that raises balancedness by more than this fraction.

Almost every slot has to be fetched then.
"""


class EngineRanks(NamedTuple):
    """Describe the ranks that an engine's EPLB places experts on, as it does.

    Attributes:
        number: of EP ranks, each with as many slots.
        groups, nodes: expert groups and nodes; groups that divide over the nodes stay whole.
        node_of_rank: int ``[ranks]``, what the ranks said themselves; without it equal runs of
            ranks are taken to share a node.
    """

    number: int
    groups: int = 1
    nodes: int = 1
    node_of_rank: Sequence[int] | None = None

    def nodes_or_runs(self) -> np.ndarray:
        """Return the node of each rank, int ``[ranks]``."""
        if self.node_of_rank is None or len(set(self.node_of_rank)) != self.nodes:
            return np.arange(self.number) // max(1, self.number // self.nodes)
        return np.asarray(self.node_of_rank)


def rebalance_table(
    load: np.ndarray,
    num_replicas: int,
    ranks: EngineRanks,
    old: np.ndarray | None = None,
    max_moves: int | None = None,
) -> np.ndarray:
    """Plan the placement of every layer, int32 ``[layers, num_replicas]``.

    With an old placement of the same size the plan moves only what pays; without one it is planned
    from nothing. As in vLLM's default policy all experts of a group stay on one node if the groups
    divide over the nodes; groups change nodes only where that gains more than `REGROUP_GAIN`.

    Args:
        load: ``[layers, experts]``, token counts.
        num_replicas: physical experts per layer.
        ranks: that they lie on.
        old: ``[layers, num_replicas]``, the placement in service.
        max_moves: most slots that change rank; None for no limit.

    Raises:
        PlacementError: when the numbers do not fit together.
    """
    from ..planner.api import plan, replan  # lazy: numba

    slots = even_slots_or_raise(num_replicas, ranks.number)
    hierarchical = ranks.nodes > 1 and ranks.groups % ranks.nodes == 0
    if old is not None and not _in_service(old, load.shape, num_replicas):
        old = None
    if not hierarchical:
        found = plan(load, slots) if old is None else replan(load, old, slots, max_moves=max_moves)
        return found.physical_to_logical
    where: dict[str, Any] = {
        "node_of_rank": ranks.nodes_or_runs(),
        "num_groups": ranks.groups,
        "locality": "node",
    }
    fresh = plan(load, slots, old=old, **where)
    if old is None:
        return fresh.physical_to_logical
    try:
        kept = replan(load, old, slots, max_moves=max_moves, **where)
    except PlacementError:
        # A group lies on several nodes, as where the engine has just started: bring it together.
        return fresh.physical_to_logical
    regroup = max_moves is None and fresh.overall > (1 + REGROUP_GAIN) * kept.overall
    return (fresh if regroup else kept).physical_to_logical


def even_slots_or_raise(num_replicas: int, num_ranks: int) -> np.ndarray:
    """Return the slots of each rank, int64 ``[ranks]``.

    Raises:
        PlacementError: if the physical experts do not divide over the ranks.
    """
    if num_ranks < 1 or num_replicas % num_ranks:
        raise PlacementError(
            f"{num_replicas} physical experts on {num_ranks} ranks: the engine gives every rank as "
            "many; change the number of redundant experts so that they divide"
        )
    return np.full(num_ranks, num_replicas // num_ranks, np.int64)


def _in_service(old: np.ndarray, load_shape: tuple[int, ...], num_replicas: int) -> bool:
    """Whether `old` is a whole placement of this size; during elastic scaling it may not be."""
    layers, experts = load_shape
    if old.shape != (layers, num_replicas) or old.min() < 0 or old.max() >= experts:
        return False
    held = np.zeros((layers, experts), bool)
    np.put_along_axis(held, old.astype(np.int64), True, axis=1)
    return bool(held.all())


def warm_up(table: np.ndarray, num_experts: int, num_ranks: int, plans: bool = True) -> None:
    """Compile planner and exchange, which the first rebalance on a machine would wait for.

    Args:
        table: int ``[layers, slots]``, a placement.
        num_experts: logical experts.
        num_ranks: EP ranks.
        plans: whether this package's planner rebalances; else the exchange only.
    """
    if plans:
        load = np.tile(1.0 + np.arange(num_experts), (table.shape[0], 1))
        rebalance_table(load, table.shape[1], EngineRanks(num_ranks), table)
    slots = (table.shape[1] // num_ranks,) * num_ranks
    here, there = (
        Placement(t, num_experts, slots) for t in (table, np.roll(table, slots[0], axis=1))
    )
    plan_exchange(here, there).chunks()
