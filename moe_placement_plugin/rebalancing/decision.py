"""Decide whether a rebalance pays: predicted gain against bytes and pause.

Pure; every decision is one line of log and a count.

The gain is predicted on the recorded load, each phase by itself, because a plan must hold for
prefill and decode together. With a cost model (`costmodel`) it is time; without one it is the
greatest rank load, which is what a layer bound by tokens would gain at most.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.errors import PlacementError
from ..core.events import count_event
from ..core.load import DECODE, ExpertLoad
from ..core.placement import Placement
from ..exchange.chunks import Chunk
from ..exchange.plan import ExchangePlan
from ..simulation.cluster import rows_for
from ..simulation.costmodel import LayerCost
from ..simulation.step_time import dead_zone, step_time
from .policy import RebalancePolicy

logger = logging.getLogger("moe_placement_plugin")

REASONS = {
    "pays": "the gain is worth the move",
    "lost_experts": "experts lie on dead ranks only",
    "unchanged": "the plan is the placement in force",
    "dead_zone": "decode in small batches is bound by weights, not by balance",
    "hysteresis": "balance has not fallen enough since the last rebalance",
    "min_gain": "the gain is below the minimum",
    "phase_loss": "a phase would lose",
    "max_bytes": "it moves more bytes than the budget; plan with fewer moves",
    "staging": "a layer takes in more than the bound on staging memory; plan with fewer moves, or "
    "give more",
    "max_pause": "it would pause longer than allowed; plan with fewer moves, or in smaller chunks",
    "payback": "the time saved does not make up for the exchange",
}
"""Reason -> what it says in the log."""


@dataclass(frozen=True)
class Decision:
    """Whether to rebalance, and why; its text is one line.

    Attributes:
        rebalance: the answer.
        reason: key of `REASONS`.
        gain: predicted, as a share.
        before, after: balancedness over all windows.
        phases: phase -> gain of that phase.
        bytes: between ranks and from the checkpoint.
        seconds: of the whole exchange; pause: of its longest chunk; saved: by the gain over the
            horizon, None without a cost model.
        chunks: into how many it is cut.
    """

    rebalance: bool
    reason: str
    gain: float = 0.0
    before: float = 1.0
    after: float = 1.0
    phases: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    pause: float = 0.0
    saved: float | None = None
    chunks: int = 0

    @property
    def events(self) -> dict[str, float]:
        """Return event -> amount, for `core.events.count_event`."""
        kind = "rebalance_accepted" if self.rebalance else "rebalance_declined"
        return {kind: 1, f"{kind}_{self.reason}": 1}

    def __str__(self) -> str:
        by_phase = ", ".join(f"{phase} {gain:+.1%}" for phase, gain in self.phases.items())
        answer = "accepted" if self.rebalance else "declined"
        text = f"expert rebalance {answer}, {REASONS[self.reason]}: gain {self.gain:+.1%}"
        text += f" ({by_phase})" if len(self.phases) > 1 else ""
        text += f", balancedness {self.before:.4f} -> {self.after:.4f}, {self.bytes / 1e6:.1f} MB"
        text += (
            f" in about {self.seconds:.3g} s, {self.chunks} chunks of at most {self.pause:.3g} s"
        )
        return text if self.saved is None else text + f"; saves {self.saved:.3g} s"


def announce(
    decision: Decision,
    count: Callable[[str, float], None] = count_event,
    log: logging.Logger = logger,
) -> None:
    """Log the decision and count it.

    Args:
        count: takes event and amount; what reaches ``/metrics`` when left out.
        log: the engine's logger, where this package's own is not shown.
    """
    log.info("%s", decision)
    for event, amount in decision.events.items():
        count(event, amount)


def decide(
    plan: ExchangePlan,
    load: ExpertLoad,
    policy: RebalancePolicy | None = None,
    cost: LayerCost | None = None,
    achieved: float | None = None,
    chunks: Sequence[Chunk] | None = None,
    all_gather: bool = False,
) -> Decision:
    """Weigh an exchange.

    Args:
        plan: from the placement in force to the one that is proposed; with the experts' true bytes.
        load: recent windows, by phase, of the plan's layers.
        policy: the defaults when left out.
        cost: a fitted cost model of this device.
        achieved: `Decision.after` of the last rebalance that was carried out; None before the
            first.
        chunks: as they would be carried out; all in one when left out.
        all_gather: whether every rank gets all tokens in a step, rather than those with a choice
            there, for a cost model.

    Raises:
        PlacementError: when load and plan are of different models.
    """
    policy = policy or RebalancePolicy()
    chunks = plan.chunks() if chunks is None else chunks
    times = [_seconds(chunk, plan, policy) for chunk in chunks]
    facts: dict[str, Any] = {
        "bytes": plan.bytes_moved + plan.bytes_read,
        "seconds": sum(times),
        "pause": max(times, default=0.0),
        "chunks": len(times),
    }
    if not len(plan.changed_rows):
        return Decision(False, "unchanged", **facts)
    if not plan.live.all() and _lost(plan):
        return Decision(True, "lost_experts", **facts)
    old, new = (
        rows_for(_live_part(p, plan.live), load, name)
        for p, name in ((plan.old, "the placement in force"), (plan.new, "the plan"))
    )
    facts |= {
        "before": old.overall_balancedness(load.counts),
        "after": new.overall_balancedness(load.counts),
    }
    spent = {
        phase: _spent(old, new, load, phase, policy, cost, all_gather)
        for phase in dict.fromkeys(load.phases)
    }
    before, after = np.sum(list(spent.values()), axis=0)
    facts |= {
        "gain": _gain(before, after),
        "phases": {phase: _gain(*both) for phase, both in spent.items()},
    }
    if cost is not None:
        facts["saved"] = float(before - after) * policy.horizon
    reason = _refusal(policy, facts, load, old, cost, achieved, plan.min_staging_bytes)
    return Decision(reason is None, reason or "pays", **facts)


def _refusal(
    policy: RebalancePolicy,
    facts: Mapping[str, Any],
    load: ExpertLoad,
    old: Placement,
    cost: LayerCost | None,
    achieved: float | None,
    staging: int,
) -> str | None:
    # The dead zone is a rule of thumb that stands in for a cost model, which knows what active
    # experts cost.
    small = policy.small_batches and set(load.phases) == {DECODE}
    rules = {
        "dead_zone": cost is None and small and 1 / facts["before"] < dead_zone(old.num_ranks),
        "hysteresis": achieved is not None and facts["before"] > achieved - policy.hysteresis,
        "min_gain": facts["gain"] < policy.min_gain,
        "phase_loss": min(facts["phases"].values()) < -policy.max_phase_loss,
        "max_bytes": policy.max_bytes is not None and facts["bytes"] > policy.max_bytes,
        "staging": policy.staging_bytes is not None and staging > policy.staging_bytes,
        "max_pause": policy.max_pause is not None and facts["pause"] > policy.max_pause,
        "payback": cost is not None and facts["saved"] < facts["seconds"],
    }
    return next((reason for reason, holds in rules.items() if holds), None)


def _gain(before: float, after: float) -> float:
    return float(1 - after / before) if before else 0.0


def _spent(
    old: Placement,
    new: Placement,
    load: ExpertLoad,
    phase: str,
    policy: RebalancePolicy,
    cost: LayerCost | None,
    all_gather: bool,
) -> tuple[float, float]:
    """Return what the phase's windows take before and after.

    Seconds with a cost model, else the sum of the greatest rank loads.
    """
    counts = load.counts[[i for i, p in enumerate(load.phases) if p == phase]]
    if cost is None:
        before, after = (float(p.rank_load(counts).max(axis=-1).sum()) for p in (old, new))
        return before, after
    tokens = policy.tokens_per_step[phase]
    total = counts.sum(axis=0)
    steps = float(total.sum(axis=1).mean()) / (tokens * policy.top_k)
    before, after = (
        step_time(p, total, tokens, policy.top_k, cost, all_gather=all_gather).total_us
        * 1e-6
        * steps
        for p in (old, new)
    )
    return before, after


def _seconds(chunk: Chunk, plan: ExchangePlan, policy: RebalancePolicy) -> float:
    """Return how long a chunk takes.

    Rounds follow each other, each as long as its largest expert; the rank that reads most reads
    meanwhile.
    """
    size = plan.expert_bytes
    rounds = np.zeros(chunk.num_rounds, dtype=np.int64)
    np.maximum.at(rounds, chunk.round_of, size[chunk.transfers.row])
    reads = np.bincount(chunk.reads.rank, weights=size[chunk.reads.row], minlength=1)
    return max(float(rounds.sum()) / policy.bandwidth, float(reads.max()) / policy.disk_bandwidth)


def _lost(plan: ExchangePlan) -> bool:
    try:
        _live_part(plan.old, plan.live)
    except PlacementError:
        return True
    return False


def _live_part(placement: Placement, live: np.ndarray) -> Placement:
    """Return the placement of the live ranks alone.

    Raises:
        PlacementError: when they do not hold every expert.
    """
    if live.all():
        return placement
    slots = live[placement.rank_of_slot]
    sizes = tuple(np.array(placement.slots_per_rank)[live].tolist())
    return type(placement)(
        placement.physical_to_logical[:, slots],
        placement.num_logical_experts,
        sizes,
        placement.layer_ids,
        placement.strategy,
    )
