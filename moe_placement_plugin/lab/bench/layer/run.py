"""Measure every EP rank's share of a MoE layer on one device, one rank after the other.

A layer lasts as long as its slowest rank, so one GPU can measure what a placement does to a layer
on 64: the time of each rank's experts under its share of a recorded load, and the greatest of them.
Exchange and attention are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ....core.errors import PlacementError
from ....core.load import ExpertLoad
from ....core.placement import Placement
from ....core.topology import Topology
from ....simulation.cluster import Cluster
from ....simulation.costmodel import Calibration, LayerCost, Measurement, fit
from ....strategies import get_strategy
from ...staged_layer import ExpertWeights, PlacedExperts, RouteOutput, gmm_down, gmm_up
from ...staged_layer.dispatching import keep_local
from ...staged_layer.matmuls.base import Matmuls
from ..timing import Stopwatch, in_turn
from .shapes import LayerShape, draw_step

HELD_OUT_EVERY = 4
"""One in so many measurements, sorted by tokens, is held out of the fit."""
CALIBRATION_SIZE = 480
"""A calibration keeps so many measurements at most."""
SPARE_MEMORY = 0.9


@dataclass(frozen=True)
class RankTime:
    """Hold the time of one rank's experts in one layer.

    Attributes:
        tokens: assignments (token, choice) of the rank.
        active: local experts with at least one.
        slots: its physical experts.
        rows: tokens that arrive.
        microseconds: median of the runs; 0 without assignments, where nothing runs.
    """

    tokens: int
    active: int
    slots: int
    rows: int
    microseconds: float


@dataclass
class LayerTimes:
    """Hold the times of one strategy at one number of ranks and one batch size.

    Attributes:
        strategy: its name, with ``+N`` for N redundant experts.
        ranks: EP ranks.
        phase: ``prefill`` or ``decode``.
        tokens_per_rank: tokens that each rank brings into the step.
        layers: layer id -> ranks, ``[layers][ranks]``.
    """

    strategy: str
    ranks: int
    phase: str
    tokens_per_rank: int
    layers: dict[int, list[RankTime]] = field(default_factory=dict)

    @property
    def microseconds(self) -> float:
        """Return the time of all measured layers, each lasting as long as its slowest rank."""
        return sum(max(r.microseconds for r in layer) for layer in self.layers.values())

    @property
    def balancedness(self) -> float:
        """Return the assignments' balancedness.

        It is the sum over layers of the ranks' mean over the sum of the ranks' greatest.
        """
        tokens = [[r.tokens for r in layer] for layer in self.layers.values()]
        return float(np.mean(tokens, axis=1).sum() / np.max(tokens, axis=1).sum())


def plan_all(
    names: Sequence[str], load: ExpertLoad, ranks: int, groups: int
) -> dict[str, Placement]:
    """Make a placement per strategy, planned on ``load``.

    ``eplb+32`` is eplb with 32 redundant experts.

    Raises:
        PlacementError: for an unknown strategy or numbers that do not fit.
    """
    plans = {}
    for name in names:
        strategy, plus, redundant = name.partition("+")
        if plus and not redundant.isdigit():
            raise PlacementError(
                f"strategy {name!r}: write the number of redundant experts after the plus, as in "
                "eplb+32"
            )
        cluster = Cluster(Topology.even(ranks), int(redundant or 0), groups)
        plans[name] = get_strategy(strategy).place(cluster.request(load))
    return plans


def rank_share(slots: torch.Tensor, placed: PlacedExperts, use_ring: bool) -> RouteOutput:
    """Return what `route` would give a rank for all ranks' choices ``slots [tokens, top_k]``.

    With the ring all tokens are rows; with the all-to-all those that have a choice here. Router
    weights are all equal.
    """
    local = placed.local_slot[slots]
    if not use_ring:
        local = local[(local >= 0).any(dim=1)]
    return keep_local(
        local,
        torch.full(local.shape, 1 / slots.shape[1], device=slots.device),
        placed.num_local,
        False,
    )


class LayerBench:
    """Measure shares of one layer shape on one device.

    Args:
        name: the shape's name.
        shape: the layer.
        device: where to measure.
        matmuls: who multiplies.
        repeats: timed runs of each share; the median counts.
        use_ring: which exchange's rows the ranks get.
    """

    def __init__(
        self,
        name: str,
        shape: LayerShape,
        device: torch.device,
        matmuls: Matmuls,
        repeats: int,
        use_ring: bool,
    ):
        self.name, self.shape, self.device, self.matmuls = name, shape, device, matmuls
        self.repeats, self.use_ring = repeats, use_ring
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.measurements: dict[str, list[Measurement]] = {}
        self._watch = Stopwatch(device, graphs=not matmuls.name.startswith("torch"))
        self._weights: ExpertWeights | None = None

    def measure(
        self,
        plans: Mapping[str, Placement],
        load: ExpertLoad,
        layers: Sequence[int],
        phase: str,
        tokens_per_rank: int,
        report: Callable[[str], None],
    ) -> list[LayerTimes]:
        """Measure all strategies on the same steps, in turn.

        Args:
            plans: name -> placement, all for the same number of ranks.
            load: what steps are drawn from.
            layers: rows of the load to measure.
            phase: ``prefill`` or ``decode``, for the report and the calibration.
            tokens_per_rank: tokens that each rank brings.
            report: takes a line of progress.

        Raises:
            PlacementError: when a share does not fit the device's memory.
        """
        ranks = next(iter(plans.values())).num_ranks
        outcomes = {name: LayerTimes(name, ranks, phase, tokens_per_rank) for name in plans}
        for row in layers:
            report(
                f"{self.name}, EP {ranks}, {phase} {tokens_per_rank} tokens per rank, layer "
                f"{load.layer_ids[row]}"
            )
            share = load.total[row].astype(np.float64)
            experts = draw_step(
                share,
                tokens_per_rank * ranks,
                self.shape.top_k,
                np.random.default_rng([row, tokens_per_rank, ranks]),
            )
            shares = {}
            for name, plan in plans.items():
                for rank in range(ranks):
                    placed = PlacedExperts.of(plan, row, rank, self.device)
                    slots = placed.deal(torch.from_numpy(experts).to(self.device))
                    shares[name, rank] = rank_share(slots, placed, self.use_ring)
            for name, times in self._time(shares, phase, ranks).items():
                outcomes[name].layers[load.layer_ids[row]] = times
        return list(outcomes.values())

    def _time(
        self, shares: Mapping[tuple[str, int], RouteOutput], phase: str, ranks: int
    ) -> dict[str, list[RankTime]]:
        self._make_room(shares, ranks)
        rows = max(s.num_rows for s in shares.values())
        x = torch.randn(rows, self.shape.hidden, device=self.device, dtype=self.dtype)
        groups = {key: s.group_sizes.cpu().numpy() for key, s in shares.items()}
        runs = {
            key: self._watch.prepare(self._share_runner(x, s))
            for key, s in shares.items()
            if groups[key].any()
        }
        times = in_turn(runs, self.repeats)
        result: dict[str, list[RankTime]] = {}
        for key, sizes in groups.items():
            median = float(np.median(times[key])) if key in times else 0.0
            found = RankTime(
                int(sizes.sum()), int((sizes > 0).sum()), sizes.size, shares[key].num_rows, median
            )
            result.setdefault(key[0], []).append(found)
            if median:
                measured = Measurement(
                    tokens=found.tokens,
                    active_experts=found.active,
                    rows=found.rows,
                    microseconds=median,
                )
                self.measurements.setdefault(phase, []).append(measured)
        return result

    def _share_runner(self, x: torch.Tensor, output: RouteOutput) -> Callable[[], torch.Tensor]:
        assert self._weights is not None, "weights are made before a share is measured"
        weights = ExpertWeights(
            self._weights.w13[: output.num_slots], self._weights.w2[: output.num_slots]
        )
        rows = x[: output.num_rows]
        return lambda: gmm_down(
            gmm_up(rows, output, weights, self.matmuls), output, weights, self.matmuls
        )

    def _make_room(self, shares: Mapping[tuple[str, int], RouteOutput], ranks: int) -> None:
        """Make weights for the rank with most slots, if they and the intermediates fit.

        Which weights does not matter to the time.
        """
        shape, width = self.shape, torch.finfo(self.dtype).bits // 8
        slots, rows = (
            max(s.num_slots for s in shares.values()),
            max(s.num_rows for s in shares.values()),
        )
        if self._weights is not None and self._weights.w13.shape[0] >= slots:
            slots = 0
        weights = 3 * slots * shape.hidden * shape.intermediate * width
        intermediates = (
            rows
            * (shape.top_k * (3 * shape.intermediate + shape.hidden) + 2 * shape.hidden)
            * width
        )
        free = SPARE_MEMORY * free_memory(self.device)
        if weights + intermediates > free:
            raise PlacementError(
                f"{self.name} at EP {ranks} needs {weights / 2**30:.1f} GiB for {slots} experts "
                f"and {intermediates / 2**30:.1f} GiB for "
                f"{rows} rows, {free / 2**30:.1f} GiB are free on {self.device}: measure more "
                "ranks (--ep) or fewer tokens (--prefill, --decode)"
            )
        if slots:
            self._weights = None
            scale = shape.hidden**-0.5

            def random(*sizes: int) -> torch.Tensor:
                return torch.empty(sizes, dtype=self.dtype, device=self.device).normal_(0, scale)

            self._weights = ExpertWeights(
                random(slots, 2 * shape.intermediate, shape.hidden),
                random(slots, shape.hidden, shape.intermediate),
            )

    def calibration(self, phase: str, facts: Mapping[str, Any], command: str) -> Calibration:
        """Return the measurements of a phase so far in the form that `simulate` reads.

        Every fourth is held out. When there are more than `CALIBRATION_SIZE`, evenly spaced ones
        by tokens are kept.
        """
        ordered = sorted(
            self.measurements.get(phase, []), key=lambda m: (m.tokens, m.active_experts)
        )
        ordered = ordered[:: -(-len(ordered) // CALIBRATION_SIZE) or 1]
        held = [
            m.model_copy(update={"held_out": i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2})
            for i, m in enumerate(ordered)
        ]
        layer = {
            "shape": self.name,
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.intermediate,
            "local_experts": 0 if self._weights is None else self._weights.w13.shape[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": self.matmuls.name,
            "phase": phase,
        }
        return Calibration(
            device=str(facts["device"]),
            layer=layer,
            provenance={**facts, "command": command},
            measurements=held,
        )


def fitted(calibration: Calibration) -> LayerCost | str:
    """Return the cost model of a calibration, or why there is none."""
    try:
        return fit(calibration.measurements)
    except PlacementError as error:
        return str(error)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated on the device now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
