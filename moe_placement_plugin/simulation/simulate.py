"""What placements would do to a recorded load, before anything is deployed.

Strategies are planned on the recording and judged on it, on the window that followed each one, and on the
other workloads; with a calibrated cost model also in time per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..core.topology import Topology
from ..strategies import PlacementRequest, Strategy
from .costmodel import LayerCost

MOST_NEXT_WINDOWS = 16
"""Latest pairs of windows that `Outcome.next_window` is averaged over."""


def dead_zone(num_ranks: int) -> float:
    """Max/mean rank load below which token balance buys nothing at small decode batches (PB-OEPLB, METRO).

    There a rank's time follows the weights of its active experts rather than its tokens.
    """
    return 1 + 0.004 * num_ranks**1.5


@dataclass(frozen=True)
class Workload:
    """A recorded load and what to call it."""

    name: str
    load: ExpertLoad


@dataclass(frozen=True)
class Cluster:
    """Where experts are to be placed.

    Attributes:
        topology: the EP ranks.
        num_redundant: redundant experts per layer.
        num_groups: expert groups of grouped top-k routing.
        locality: see `PlacementRequest.locality`.
    """

    topology: Topology
    num_redundant: int = 0
    num_groups: int = 1
    locality: str = "none"

    def request(self, load: ExpertLoad) -> PlacementRequest:
        """The request to place the load's model here."""
        return PlacementRequest(
            load.num_layers, load.num_experts, self.topology, self.num_redundant, (), load.layer_ids, self.num_groups, load,
            self.locality,
        )  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Time of the MoE layers in a step of ``tokens`` tokens, over sampled steps.

    Attributes:
        tokens: tokens per step over all ranks.
        layer_us: microseconds of the slowest rank, mean over steps, ``[layers]``.
        ideal_us: the same if tokens and active experts were even over the ranks, ``[layers]``.
    """

    tokens: int
    layer_us: np.ndarray
    ideal_us: np.ndarray

    @property
    def total_us(self) -> float:
        """Microseconds of all layers."""
        return float(self.layer_us.sum())


@dataclass(frozen=True)
class Outcome:
    """How one strategy or plan fares.

    Attributes:
        name: of the strategy or plan.
        placement: planned on all workloads together.
        overall: balancedness over all windows: sum of the mean rank loads / sum of the greatest.
        per_layer: the same per layer, ``[layers]``.
        per_window: the same per window, ``[windows]`` over all workloads in order.
        next_window: planned on a window and judged on the one that follows; None with one window only.
        served: planned on the row's workload alone and judged on the column's, ``[workloads, workloads]``; None with
            one workload only.
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
        """Greatest over mean rank load."""
        return 1 / self.overall


@dataclass(frozen=True)
class Simulation:
    """Outcomes side by side.

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
        """The outcome with the greatest balancedness, or with a cost model the least time."""
        return min(self.outcomes, key=lambda o: o.step.total_us if o.step else -o.overall)

    def verdict(self) -> list[str]:
        """Whether balance buys anything over the first outcome, in plain sentences."""
        base, best = self.outcomes[0], self.best
        phases = {phase for workload in self.workloads for phase in workload.load.phases}
        ranks = base.placement.num_ranks
        sentences = []
        if best is base or best.overall <= base.overall * 1.005:
            sentences.append(
                f"Nothing here balances better than {base.name} by more than half a percent: leave the placement as it is."
            )
        else:
            gain = best.overall / base.overall
            sentences.append(
                f"{best.name} lowers the greatest rank load to {base.overall / best.overall:.0%} of {base.name}'s "
                f"(balancedness {base.overall:.3f} -> {best.overall:.3f}); a layer bound by tokens gains up to {gain:.2f}x."
            )
        if "prefill" not in phases or phases == {"prefill", "mixed"}:
            if base.max_over_mean < self.dead_zone:
                sentences.append(
                    f"Dead zone: {base.name}'s max/mean rank load is {base.max_over_mean:.2f}, below {self.dead_zone:.2f} for {ranks} "
                    "ranks. At small decode batches balance buys nothing there: time follows the weights of the active experts."
                )
        if self.cost is None:
            sentences.append(
                "Times need a calibration file of your device (--calibration; `moe-placement bench layer` measures one)."
            )
        elif best.step is not None and base.step is not None and best is not base:
            change = base.step.total_us / best.step.total_us - 1
            sentences.append(
                f"Predicted at {best.step.tokens} tokens per step: {base.step.total_us / 1000:.2f} ms of MoE layers with {base.name}, "
                f"{best.step.total_us / 1000:.2f} ms with {best.name} ({change:+.1%}; {self.cost.accuracy})."
            )
        return sentences


def align(workloads: Sequence[Workload]) -> list[Workload]:
    """The workloads on the layers in which any of them saw a token.

    Raises:
        PlacementError: when they are of different models or all are empty.
    """
    first = workloads[0].load
    used: set[int] = set()
    for workload in workloads:
        load = workload.load
        if load.num_experts != first.num_experts or load.layer_ids != first.layer_ids:
            raise PlacementError(
                f"{workloads[0].name} has {first.num_layers} layers x {first.num_experts} experts, {workload.name} has "
                f"{load.num_layers} x {load.num_experts}: loads to be taken together must be of one model"
            )
        try:
            used |= set(load.moe_layers().layer_ids)
        except PlacementError as error:
            raise PlacementError(f"{workload.name}: {error}") from None
    layers = [i for i in first.layer_ids if i in used]
    return [Workload(w.name, w.load.select_layers(layers)) for w in workloads]


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
        candidates: name -> strategy, planned here, or plan, taken as it is. The first is what the verdict compares with.
        cluster: the ranks and redundant experts that strategies plan for.
        cost: a fitted cost model, for times.
        tokens_per_step: tokens of a step over all ranks, for times.
        top_k: experts per token, for times.
        all_gather: whether every rank gets all tokens, rather than those with a choice there, for times.

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


def rows_for(plan: Placement, load: ExpertLoad, name: str) -> Placement:
    """The rows of a plan for the layers of a load.

    Raises:
        PlacementError: when the plan is for another model.
    """
    if plan.num_logical_experts != load.num_experts:
        raise PlacementError(
            f"{name} is a plan for {plan.num_logical_experts} experts, the load has {load.num_experts}: they are of different models"
        )
    if set(load.layer_ids) <= set(plan.layer_ids):
        return plan.select_layers(load.layer_ids)
    if plan.num_layers == load.num_layers:  # one of the two numbers MoE layers only
        return type(plan)(
            plan.physical_to_logical,
            plan.num_logical_experts,
            plan.slots_per_rank,
            load.layer_ids,
            plan.strategy,
            plan.metadata,
        )
    raise PlacementError(
        f"{name} is a plan for {plan.num_layers} layers, the load has tokens in {load.num_layers} ({load.layer_ids[0]}.."
        f"{load.layer_ids[-1]}): they are of different models"
    )


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


def step_time(
    placement: Placement,
    counts: np.ndarray,
    tokens: int,
    top_k: int,
    cost: LayerCost,
    steps: int = 32,
    seed: int = 0,
    all_gather: bool = False,
) -> StepTime:
    """Predicted time of the MoE layers in steps of ``tokens`` tokens.

    Steps are drawn from the recorded shares, expert choices independent of each other; the replicas of an expert
    take its tokens in turn. A layer lasts as long as its slowest rank.

    Args:
        placement: rows for the same layers as ``counts``.
        counts: recorded tokens per expert, ``[layers, experts]``.
        tokens: tokens per step over all ranks.
        top_k: experts per token.
        cost: the fitted cost model.
        steps: steps to draw.
        seed: of the draws.
        all_gather: whether every rank gets all tokens, rather than those with a choice there.
    """
    rng = np.random.default_rng(seed)
    layers, ranks = placement.num_layers, placement.num_ranks
    layer_us, ideal_us = np.zeros(layers), np.zeros(layers)
    slot_order = _copy_number(placement)
    for layer in range(layers):
        share = (
            counts[layer] / counts[layer].sum()
            if counts[layer].any()
            else np.full(counts.shape[1], 1 / counts.shape[1])
        )
        drawn = rng.multinomial(tokens * top_k, share, size=steps)
        experts = placement.physical_to_logical[layer]
        replicas = placement.replica_counts[layer, experts]
        # Copy c of r takes one token more while tokens mod r > c.
        per_slot = drawn[:, experts] // replicas + (
            drawn[:, experts] % replicas > slot_order[layer]
        )
        per_rank, active, rows = np.zeros((3, steps, ranks))
        used = np.flatnonzero(placement.slots_per_rank)
        starts = placement.rank_offsets[:-1][used]
        per_rank[:, used] = np.add.reduceat(per_slot, starts, axis=1)
        active[:, used] = np.add.reduceat(per_slot > 0, starts, axis=1)
        rows[:, used] = tokens if all_gather else _arrived(per_slot, starts, tokens)
        layer_us[layer] = cost.time(per_rank, active, rows).max(axis=1).mean()
        ideal_us[layer] = cost.time(
            per_rank.mean(axis=1), active.mean(axis=1), rows.mean(axis=1)
        ).mean()
    return StepTime(tokens, layer_us, ideal_us)


def _arrived(per_slot: np.ndarray, starts: np.ndarray, tokens: int) -> np.ndarray:
    """Expected tokens with at least one choice on a rank, ``[steps, ranks]``, of each slot's tokens ``[steps, slots]``.

    A token chooses as many experts as any other and none twice. So the number of its choices on a rank varies as in sampling of a fixed size
    (Hajek 1964), and it is none of them as often as in the binomial distribution of that mean and variance: within 1% of tokens routed at
    random, and 1 to 7% of recorded ones, whose experts are chosen together.
    """
    chosen = np.minimum(per_slot / tokens, 1.0)
    mean, free = (np.add.reduceat(x, starts, axis=1) for x in (chosen, chosen * (1 - chosen)))
    total = free.sum(axis=1, keepdims=True)
    variance = free * (1 - np.divide(free, total, out=np.ones_like(free), where=total > 0))
    here = mean > 0
    none = np.ones_like(mean)
    none[here] = (variance[here] / mean[here]) ** (mean[here] ** 2 / (mean[here] - variance[here]))
    return tokens * (1 - none)


def _copy_number(placement: Placement) -> np.ndarray:
    """int64 ``[layers, slots]``: how many slots before this one hold the same expert."""
    layers, slots = placement.physical_to_logical.shape
    result = np.zeros((layers, slots), dtype=np.int64)
    table = placement.logical_to_physical
    for copy in range(1, table.shape[2]):
        layer, expert = np.nonzero(table[:, :, copy] >= 0)
        result[layer, table[layer, expert, copy]] = copy
    return result
