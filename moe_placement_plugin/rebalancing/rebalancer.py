"""Propose a placement to an engine's EPLB, and say whether it pays to go there."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import PlacementError
from ..core.events import count_event
from ..core.load import ExpertLoad
from ..core.placement import EngineTable, Placement
from ..core.topology import Topology
from ..exchange.plan import ExchangePlan, plan_exchange
from ..simulation.costmodel import LayerCost, find_calibration, fit
from .decision import Decision, announce, decide
from .lost_experts import place_lost
from .policy import RebalancePolicy
from .tables import EngineRanks, rebalance_table


def policy_from(values: Mapping[str, Any] | None, flag: str) -> RebalancePolicy:
    """Return the rules that the user gave, over the defaults.

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
        _cost_model(policy)  # read where the server starts, not at its first rebalance
        return policy
    except PlacementError as error:
        raise PlacementError(f"{flag}: {error}") from error
    except TypeError as error:
        raise PlacementError(f"{flag} {dict(values or {})}: {error}") from error


def _cost_model(policy: RebalancePolicy) -> LayerCost | None:
    if policy.calibration is None:
        return None
    return fit(find_calibration(policy.calibration).measurements)


class Proposal(NamedTuple):
    """Hold what is proposed to an engine.

    Attributes:
        table: int32 ``[layers, slots]``, the placement to serve with from now on: the one in force
            where a rebalance does not pay.
        decision: whether it pays.
        exchange: what leads there, as it was weighed; None where a rebalance does not pay.
    """

    table: np.ndarray
    decision: Decision
    exchange: ExchangePlan | None


class Rebalancer:
    """Plans with few moves and decides whether they pay; the same on every rank, for one load.

    Args:
        policy: when to rebalance.
        layer_ids: of the model's MoE layers, in the order of the engine's tables.
        expert_bytes: bytes of one expert with all its parameters, of each layer or of all alike.
        log: the engine's logger.
        topology: the ranks' nodes.
        all_gather: whether every rank gets all tokens in a step, rather than those with a choice
            there.
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
        self._cost = _cost_model(policy)
        self._achieved: float | None = None

    def propose(
        self,
        load: ExpertLoad,
        in_force: np.ndarray,
        ranks: EngineRanks,
        live_ranks: Sequence[int] | None = None,
    ) -> Proposal:
        """Plan, weigh the exchange that leads there, and log and count the decision.

        Args:
            load: recent windows, by phase where the engine tells them apart; each token once, which
                a cost model needs.
            in_force: int ``[layers, slots]``, the placement in force.
            ranks: as the engine describes them.
            live_ranks: ranks that are up; None for all. The others get nothing, and their slots
                stay as they are. If experts lie on none of these, they are placed and nothing else
                moves: a server without an expert waits.
        """
        began = time.perf_counter()
        slots = (in_force.shape[1] // ranks.number,) * ranks.number
        old = EngineTable(in_force, load.num_experts, slots, load.layer_ids, "in force")
        table = self._plan(load.counts.sum(axis=0), old, ranks, live_ranks)
        new = EngineTable(table, load.num_experts, slots, load.layer_ids, "eplb")
        exchange = plan_exchange(old, new, self.topology, live_ranks, self.expert_bytes)
        bound = self.policy.staging_bytes
        fits = bound is None or exchange.min_staging_bytes <= bound
        decision = decide(
            exchange,
            load,
            self.policy,
            self._cost,
            self._achieved,
            exchange.chunks(bound) if fits else None,
            self.all_gather,
        )
        announce(decision, log=self.log)
        if not decision.rebalance:
            return Proposal(old.physical_to_logical, decision, None)
        self._achieved = decision.after
        count_event("rebalances")
        count_event("moved_bytes", decision.bytes)
        count_event("planning_seconds", time.perf_counter() - began)
        return Proposal(table, decision, exchange)

    def _plan(
        self,
        load: np.ndarray,
        old: Placement,
        ranks: EngineRanks,
        live_ranks: Sequence[int] | None,
    ) -> np.ndarray:
        """Return a table, int32 ``[layers, slots]``, within the budget of moves."""
        most = self.policy.max_bytes
        budget = None if most is None else int(most // max(int(self.expert_bytes.max()), 1))
        table = old.physical_to_logical
        if live_ranks is None or len(live_ranks) == ranks.number:
            if self.topology is not None:
                ranks = ranks._replace(node_of_rank=self.topology.node_of_rank)
            return rebalance_table(load, table.shape[1], ranks, table, budget)
        kept = place_lost(old, live_ranks, load).physical_to_logical
        if (kept != table).any():
            return kept
        slots = np.flatnonzero(np.isin(old.rank_of_slot, list(live_ranks)))
        held = np.ascontiguousarray(kept[:, slots])
        result = kept.copy()
        result[:, slots] = rebalance_table(
            load, slots.size, EngineRanks(len(live_ranks)), held, budget
        )
        return result
