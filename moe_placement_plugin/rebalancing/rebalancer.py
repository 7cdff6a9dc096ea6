"""Between an engine's EPLB and the planner: propose a placement, weigh it, and keep the one in force where it does not pay."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.events import count_event
from ..core.load import ExpertLoad
from ..core.placement import EngineTable, Placement
from ..core.topology import Topology
from ..exchange.plan import ExchangePlan, plan_exchange
from ..simulation.costmodel import LayerCost, find_calibration, fit
from .decision import Decision, RebalancePolicy, announce, decide
from .lost_experts import place_lost

REBALANCE_FLAG = "--expert-rebalance"


def add_argument(group: Any) -> None:
    """Add `REBALANCE_FLAG` to an argparse group."""
    group.add_argument(
        REBALANCE_FLAG,
        default=None,
        type=_json_object,
        metavar="JSON",
        help="When strategy eplb rebalances under --enable-eplb: an object with some of min_gain, max_phase_loss, hysteresis, "
        "max_bytes, max_pause, staging_bytes, calibration, bandwidth, peer_memory (docs/exchange.md).",
    )


def _json_object(text: str) -> dict[str, Any]:
    import argparse

    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def policy_from(values: Mapping[str, Any] | None, flag: str) -> RebalancePolicy:
    """The rules that the user gave, over the defaults.

    Args:
        values: names of `RebalancePolicy` -> values; None for the defaults.
        flag: for messages.

    Raises:
        PlacementError: for an unknown name or a value that makes no sense.
    """
    known = {f.name: f for f in fields(RebalancePolicy)}
    if not isinstance(values or {}, Mapping):
        raise PlacementError(
            f"{flag} {values!r}: give a JSON object with some of {', '.join(known)}"
        )
    for name in values or {}:
        if name not in known:
            raise PlacementError(f"{flag}: {name!r} is not one of {', '.join(known)}")
    try:
        policy = RebalancePolicy(**(values or {}))
        _cost(policy)  # read where the server starts, not at its first rebalance
        return policy
    except PlacementError as error:
        raise PlacementError(f"{flag}: {error}") from error
    except TypeError as error:
        raise PlacementError(f"{flag} {dict(values or {})}: {error}") from error


def _cost(policy: RebalancePolicy) -> LayerCost | None:
    return (
        None
        if policy.calibration is None
        else fit(find_calibration(policy.calibration).measurements)
    )


class Rebalancer:
    """Plans with few moves and decides whether they pay; the same on every rank, given the same load.

    Args:
        policy: when to rebalance.
        layer_ids: of the model's MoE layers, in the order of the engine's tables.
        expert_bytes: bytes of one expert with all its parameters, of each layer or of all alike.
        log: the engine's logger.
        topology: the ranks' nodes.
        all_gather: whether every rank gets all tokens in a step, rather than those with a choice there.
    """

    def __init__(
        self,
        policy: RebalancePolicy,
        layer_ids: Sequence[int],
        expert_bytes: int | Sequence[int],
        log: logging.Logger,
        topology: Topology | None = None,
        all_gather: bool = False,
    ):
        self.log = log
        self.policy = policy
        self.layer_ids = tuple(layer_ids)
        self.expert_bytes = np.broadcast_to(
            np.asarray(expert_bytes, dtype=np.int64), (len(self.layer_ids),)
        )
        self.topology = topology
        self.all_gather = all_gather
        self._cost = _cost(policy)
        self.last: Decision | None = None
        self.counted_by = 1
        """Ranks that count the same token, so that the engine's sum over ranks holds it as often."""
        self.phases: np.ndarray | None = None
        """Load by phase, int64 ``[phases, layers, experts]``, where the engine adds it up before it asks; for the next `propose` only."""
        self._achieved: float | None = None

    def propose(
        self,
        load: ExpertLoad,
        old: np.ndarray,
        num_ranks: int,
        groups: int = 1,
        nodes: int = 1,
        live_ranks: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ExchangePlan]:
        """The placement to serve with from now on, and the exchange that leads there.

        The decision is logged, counted and kept as `last`.

        Args:
            load: recent windows, by phase where the engine tells them apart; each token once, which a cost model needs.
            old: int ``[layers, slots]``, the placement in force.
            num_ranks: EP ranks, with equally many slots.
            groups, nodes: expert groups and nodes; groups that divide over the nodes stay whole.
            live_ranks: ranks that are up; None for all. The others get nothing, and their slots stay as they are. If experts lie on none of
                these, they are placed and nothing else moves: a server without an expert waits.

        Returns:
            (int32 ``[layers, slots]``, equal to ``old`` where a rebalance does not pay; the plan, empty then).
        """
        began = time.perf_counter()
        slots = (old.shape[1] // num_ranks,) * num_ranks
        before = EngineTable(old, load.num_experts, slots, load.layer_ids, "in force")
        budget = (
            None
            if self.policy.max_bytes is None
            else int(self.policy.max_bytes // max(int(self.expert_bytes.max()), 1))
        )
        table = self._table(load.counts.sum(axis=0), before, groups, nodes, live_ranks, budget)
        after = EngineTable(table, load.num_experts, slots, load.layer_ids, "eplb")
        exchange = plan_exchange(before, after, self.topology, live_ranks, self.expert_bytes)
        fits = (
            self.policy.staging_bytes is None
            or exchange.min_staging_bytes <= self.policy.staging_bytes
        )
        chunks = exchange.chunks(self.policy.staging_bytes) if fits else None
        self.last = decision = decide(
            exchange, load, self.policy, self._cost, self._achieved, chunks, self.all_gather
        )
        announce(decision, log=self.log)
        if not decision.rebalance:
            return before.physical_to_logical, plan_exchange(
                before, before, self.topology, live_ranks, self.expert_bytes
            )
        self._achieved = decision.after
        count_event("rebalances")
        count_event("moved_bytes", decision.bytes)
        count_event("planning_seconds", time.perf_counter() - began)
        return table, exchange

    def _table(
        self,
        load: np.ndarray,
        before: Placement,
        groups: int,
        nodes: int,
        live_ranks: Sequence[int] | None,
        budget: int | None,
    ) -> np.ndarray:
        from .tables import rebalance_table  # lazy: numba

        table, ranks = before.physical_to_logical, before.num_ranks
        if live_ranks is None or len(live_ranks) == ranks:
            where = None if self.topology is None else self.topology.node_of_rank
            return rebalance_table(
                load,
                table.shape[1],
                groups,
                nodes,
                ranks,
                table,
                max_moves=budget,
                node_of_rank=where,
            )
        kept = place_lost(before, live_ranks, load).physical_to_logical
        if (kept != table).any():
            return kept
        slots = np.flatnonzero(np.isin(before.rank_of_slot, list(live_ranks)))
        result = kept.copy()
        result[:, slots] = rebalance_table(
            load,
            slots.size,
            1,
            1,
            len(live_ranks),
            np.ascontiguousarray(kept[:, slots]),
            max_moves=budget,
        )
        return result
