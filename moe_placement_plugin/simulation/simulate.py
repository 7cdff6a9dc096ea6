"""Say what placements would do to a recorded load, before anything is deployed.

Strategies are planned on the recording and judged on it, on the window that followed each one, and
on the other workloads; with a calibrated cost model also in time per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.load import MIXED, PREFILL, ExpertLoad
from ..core.placement import Placement
from ..strategies import Strategy
from .cluster import Cluster, Workload, align, rows_for
from .costmodel import LayerCost
from .step_time import StepTime, dead_zone, step_time

MOST_NEXT_WINDOWS = 16
"""Latest pairs of windows that `Outcome.next_window` is averaged over."""


@dataclass(frozen=True)
class Outcome:
    """Tell how one strategy or plan fares.

    Attributes:
        name: of the strategy or plan.
        placement: planned on all workloads together.
        overall: balancedness over all windows: sum of the mean rank loads / sum of the greatest.
        per_layer: the same per layer, ``[layers]``.
        per_window: the same per window, ``[windows]`` over all workloads in order.
        next_window: planned on a window and judged on the one that follows; None with one window
            only.
        served: planned on the row's workload alone and judged on the column's, ``[workloads,
            workloads]``; None with one workload only.
        step: time per step, with a cost model only.
    """

    name: str
    placement: Placement
    overall: float
    per_layer: np.ndarray
    per_window: np.ndarray
    next_window: float | None = None
    served: np.ndarray | None = None
    step: StepTime | None = None

    @property
    def max_over_mean(self) -> float:
        """Return the greatest over the mean rank load."""
        return 1 / self.overall


@dataclass(frozen=True)
class Simulation:
    """Hold outcomes side by side.

    Attributes:
        workloads: what was simulated, aligned to the same layers.
        outcomes: one per strategy or plan, in the order asked for.
        cost: the cost model, None without calibration.
        dead_zone: see `dead_zone`.
    """

    workloads: Sequence[Workload]
    outcomes: Sequence[Outcome]
    cost: LayerCost | None = None
    dead_zone: float = field(default=1.0)

    @property
    def best(self) -> Outcome:
        """Return the outcome of the greatest balancedness, or with a cost model the least time."""
        return min(self.outcomes, key=lambda o: o.step.total_us if o.step else -o.overall)

    def verdict(self) -> list[str]:
        """Say whether balance buys anything over the first outcome, in plain sentences."""
        base, best = self.outcomes[0], self.best
        phases = {phase for workload in self.workloads for phase in workload.load.phases}
        ranks = base.placement.num_ranks
        sentences = []
        if best is base or best.overall <= base.overall * 1.005:
            sentences.append(
                f"Nothing here balances better than {base.name} by more than half a percent: "
                "leave the placement as it is."
            )
        else:
            gain = best.overall / base.overall
            sentences.append(
                f"{best.name} lowers the greatest rank load to {base.overall / best.overall:.0%} "
                f"of {base.name}'s "
                f"(balancedness {base.overall:.3f} -> {best.overall:.3f}); a layer bound by "
                f"tokens gains up to {gain:.2f}x."
            )
        if PREFILL not in phases or phases == {PREFILL, MIXED}:
            if base.max_over_mean < self.dead_zone:
                sentences.append(
                    f"Dead zone: {base.name}'s max/mean rank load is {base.max_over_mean:.2f}, "
                    f"below {self.dead_zone:.2f} for {ranks} "
                    "ranks. At small decode batches balance buys nothing there: time follows the "
                    "weights of the active experts."
                )
        if self.cost is None:
            sentences.append(
                "Times need a calibration file of your device (--calibration; `moe-placement "
                "bench layer` measures one)."
            )
        elif best.step is not None and base.step is not None and best is not base:
            change = base.step.total_us / best.step.total_us - 1
            sentences.append(
                f"Predicted at {best.step.tokens} tokens per step: "
                f"{base.step.total_us / 1000:.2f} ms of MoE layers with {base.name}, "
                f"{best.step.total_us / 1000:.2f} ms with {best.name} ({change:+.1%}; "
                f"{self.cost.accuracy})."
            )
        return sentences


def simulate(
    workloads: Sequence[Workload],
    candidates: Mapping[str, Strategy | Placement],
    cluster: Cluster,
    cost: LayerCost | None = None,
    tokens_per_step: int = 4096,
    top_k: int = 8,
    all_gather: bool = False,
) -> Simulation:
    """Compare strategies and plans on recorded loads.

    Args:
        workloads: recorded loads of one model.
        candidates: name -> strategy, planned here, or plan, taken as it is. The first is what the
            verdict compares with.
        cluster: the ranks and redundant experts that strategies plan for.
        cost: a fitted cost model, for times.
        tokens_per_step: tokens of a step over all ranks, for times.
        top_k: experts per token, for times.
        all_gather: whether every rank gets all tokens, rather than those with a choice there, for
            times.

    Raises:
        PlacementError: when loads and plans do not fit together.
    """
    workloads = align(workloads)
    together = ExpertLoad.concatenate([w.load for w in workloads])

    def timed(placement: Placement) -> StepTime | None:
        if cost is None:
            return None
        return step_time(
            placement, together.total, tokens_per_step, top_k, cost, all_gather=all_gather
        )

    outcomes = [
        _outcome(name, candidate, workloads, together, cluster, timed)
        for name, candidate in candidates.items()
    ]
    return Simulation(workloads, outcomes, cost, dead_zone(outcomes[0].placement.num_ranks))


def _outcome(
    name: str,
    candidate: Strategy | Placement,
    workloads: Sequence[Workload],
    together: ExpertLoad,
    cluster: Cluster,
    timed: Callable[[Placement], StepTime | None],
) -> Outcome:
    if isinstance(candidate, Placement):
        placement = rows_for(candidate, together, name)
    else:
        placement = candidate.place(cluster.request(together))
    planner = candidate if isinstance(candidate, Strategy) and candidate.needs_load else None
    ranks = placement.rank_load(together.counts)
    greatest, mean = ranks.max(axis=-1), ranks.mean(axis=-1)

    def plan_on(load: ExpertLoad) -> Placement:
        return placement if planner is None else planner.place(cluster.request(load))

    served = None
    if len(workloads) > 1:
        plans = [plan_on(w.load) for w in workloads]
        served = np.array(
            [[plan.overall_balancedness(w.load.counts) for w in workloads] for plan in plans]
        )
    return Outcome(
        name,
        placement,
        placement.overall_balancedness(together.counts),
        _ratio(mean.sum(axis=0), greatest.sum(axis=0)),
        _ratio(mean.sum(axis=1), greatest.sum(axis=1)),
        _next_window(workloads, plan_on),
        served,
        timed(placement),
    )


def _ratio(mean: np.ndarray, greatest: np.ndarray) -> np.ndarray:
    return np.divide(mean, greatest, out=np.ones_like(mean), where=greatest > 0)


def _next_window(
    workloads: Sequence[Workload], plan_on: Callable[[ExpertLoad], Placement]
) -> float | None:
    pairs = []
    for workload in workloads:
        load = workload.load
        for phase in dict.fromkeys(load.phases):
            of_phase = [i for i, p in enumerate(load.phases) if p == phase]
            pairs += [(load, i, j) for i, j in zip(of_phase, of_phase[1:])]
    if not pairs:
        return None
    mean = greatest = 0.0
    for load, i, j in pairs[-MOST_NEXT_WINDOWS:]:
        plan = plan_on(ExpertLoad(load.counts[i], load.layer_ids, (load.phases[i],)))
        ranks = plan.rank_load(load.counts[j])
        mean += float(ranks.mean(axis=-1).sum())
        greatest += float(ranks.max(axis=-1).sum())
    return mean / greatest if greatest else 1.0
