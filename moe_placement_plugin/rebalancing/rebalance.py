"""Keep one rebalance in one object, through an engine's EPLB from the load to the check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.load import ExpertLoad
from ..exchange.plan import ExchangePlan
from ..exchange.watchdog import WaitingFor, Watchdog
from .decision import Decision
from .rebalancer import Rebalancer
from .tables import EngineRanks


@dataclass
class Rebalance:
    """Hold one rebalance of one model, on one rank.

    Attributes:
        watchdog: times all of it, and is told what is waited for.
        peers: the other EP ranks.
        rebalancer: plans and decides; None where the engine's own algorithm does.
        phases: load by phase, int64 ``[phases, layers, experts]``, in the order of `load.PHASES`;
            None where the engine does not add it up before it asks for a plan.
        load: what was decided on; None before.
        decision: whether it pays; None before.
        exchange: what was weighed and is to be carried out; None where nothing moves, and where the
            engine's own algorithm plans.
        moved: layers whose slots have changed and were not checked since.
    """

    watchdog: Watchdog
    peers: tuple[int, ...] = ()
    rebalancer: Rebalancer | None = None
    phases: np.ndarray | None = None
    load: ExpertLoad | None = None
    decision: Decision | None = None
    exchange: ExchangePlan | None = None
    moved: list[int] = field(default_factory=list)

    def waits_for(self, step: str, layers: Sequence[int] = ()) -> None:
        """Tell the watchdog that the other ranks are waited for.

        Args:
            step: what they do, as `WaitingFor.step`.
            layers: that they do it with.
        """
        self.watchdog.waits_for(WaitingFor(step, tuple(layers), peers=self.peers))

    def propose(
        self,
        load: ExpertLoad,
        in_force: np.ndarray,
        ranks: EngineRanks,
        live_ranks: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Decide, and return the table to serve with from now on, int32 ``[layers, slots]``.

        Args:
            load, in_force, ranks, live_ranks: as `Rebalancer.propose` takes them.
        """
        assert self.rebalancer is not None, "only who plans is asked for a proposal"
        proposal = self.rebalancer.propose(load, in_force, ranks, live_ranks)
        self.load, self.decision, self.exchange = load, proposal.decision, proposal.exchange
        return proposal.table


def other_ranks(group: Any) -> tuple[int, ...]:
    """Return the ranks of an engine's group but this one.

    Args:
        group: a ``GroupCoordinator`` of vLLM or SGLang.
    """
    return tuple(rank for rank in range(group.world_size) if rank != group.rank_in_group)
