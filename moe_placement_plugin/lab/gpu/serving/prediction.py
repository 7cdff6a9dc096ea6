"""Predict each server's MoE layers and throughput by `simulate`'s cost model.

It is also said how far off that is.

The layers are compared with the busiest ranks' kernels for their experts in a profile, which do not
depend on what else a server, its client or the machine do. For throughput, a server's time per
token is taken as ``rest + share * layer``, where ``layer`` is the predicted time of its MoE layers.
``rest`` and ``share`` follow from the two servers that are farthest apart, the first one and the
ideal; the others' throughput is then predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .... import ExpertLoad, Placement, PlacementError, get_strategy
from ....core.topology import Topology
from ....simulation.cluster import Cluster
from ....simulation.costmodel import LayerCost, find_calibration, fit
from ....simulation.step_time import step_time
from .contestants import LARGEST_STEP
from .kernels import LOADS
from .models import Model
from .traffic import WORKLOADS, Workload

MIN_APART = 0.01
"""Relative difference of two servers' predicted layers below which nothing can be told."""


def costs(names: Sequence[str]) -> dict[str, LayerCost]:
    """Fit the cost models of calibrations, by the phase that each was measured for.

    Args:
        names: files, or calibrations that come with the package.

    Raises:
        PlacementError: when there is no such calibration, or two are of one phase.
    """
    found: dict[str, LayerCost] = {}
    for name in names:
        calibration = find_calibration(name)
        phase = calibration.layer.get("phase", "")
        if phase in found:
            raise PlacementError(
                f"--calibration {name}: a second one for {phase or 'no phase'}: give one for "
                "prefill and one for decode"
            )
        found[phase] = fit(calibration.measurements)
    return found


def cost_of(workload: str, known: Mapping[str, LayerCost]) -> LayerCost:
    """Return the cost model of the workload's phase; all but decode are mostly prefill.

    With one calibration only, it is that one's.
    """
    return known.get("decode" if workload == "decode" else "prefill", next(iter(known.values())))


def step_tokens(name: str, workload: Workload) -> int:
    """Return the tokens of a typical forward pass: of prompts, or one of each request under way."""
    if name == "decode":
        return workload.concurrency
    return min(LARGEST_STEP, workload.concurrency * workload.prompt)


def layer_times(
    placements: Mapping[str, Placement],
    counts: np.ndarray,
    ideal: Placement,
    tokens: int,
    top_k: int,
    cost: LayerCost,
) -> dict[str, float]:
    """Return the microseconds of all MoE layers in one forward pass, by server.

    Args:
        placements: of the servers whose placement stays.
        counts: what was recorded, ``[layers, experts]``.
        ideal: the placement of the server that is called ``ideal``, whose experts are all loaded
            alike.
        tokens: per forward pass.
        top_k: experts per token.
        cost: the fitted cost model.
    """

    def total(placement: Placement, counts: np.ndarray) -> float:
        # Neither engine sends tokens to ranks as it is started here: all are gathered on every
        # rank.
        return float(
            step_time(placement, counts, tokens, top_k, cost, all_gather=True).layer_us.sum()
        )

    return {name: total(placement, counts) for name, placement in placements.items()} | {
        "ideal": total(ideal, np.ones_like(counts))
    }


def predict(
    layers: Mapping[str, float], measured: Mapping[str, float], first: str
) -> dict[str, dict[str, float]]:
    """Predict the tokens per second of the servers between the first and the ideal one.

    The prediction's relative error is added.

    Args:
        layers: of `layer_times`.
        measured: tokens per second, by server.
        first: the server that the others are compared with.

    Returns:
        server -> ``predicted`` tokens per second and its ``error``; empty when the two servers'
        layers are alike, so that nothing can be told.
    """
    if (
        not {first, "ideal"} <= layers.keys() & measured.keys()
        or abs(layers[first] / layers["ideal"] - 1) < MIN_APART
    ):
        return {}
    share = (1 / measured[first] - 1 / measured["ideal"]) / (layers[first] - layers["ideal"])
    result = {}
    for name in layers.keys() & measured.keys() - {first, "ideal"}:
        predicted = 1 / (1 / measured[first] + share * (layers[name] - layers[first]))
        result[name] = {"predicted": predicted, "error": predicted / measured[name] - 1}
    return dict(sorted(result.items()))


def predict_layers(
    layers: Mapping[str, float], measured: Mapping[str, float], first: str
) -> dict[str, dict[str, float]]:
    """Put predicted MoE layers beside profiled ones.

    Args:
        layers: of `layer_times`.
        measured: server -> microseconds of the busiest ranks' kernels for their experts, of all
            layers.
        first: the server that the others are compared with.

    Returns:
        server -> ``predicted`` and ``measured`` microseconds, and ``error`` of the prediction: of
        the first server's itself, and of how many times as long as the first one's the others'
        layers take, which is what a placement is chosen by. Servers without a prediction, or
        without kernels that are known to be the experts', are left out.
    """
    off = {name: layers[name] / time for name, time in measured.items() if time and name in layers}
    if first not in off:
        return {}
    error = {name: (one if name == first else one / off[first]) - 1 for name, one in off.items()}
    return {
        name: {"predicted": layers[name], "measured": measured[name], "error": error[name]}
        for name in off
    }


@dataclass(frozen=True)
class Predictor:
    """Make the predictions for one run.

    Attributes:
        costs: of `costs`.
        model: what is served.
        ranks: EP ranks.
        load: what is routed.
        placed: server -> its placement, of those whose placement stays.
        first: the server that the others are compared with.
    """

    costs: Mapping[str, LayerCost]
    model: Model
    ranks: int
    load: ExpertLoad
    placed: Mapping[str, Placement]
    first: str

    def throughput(self, workload: str, rounds: Mapping[str, Sequence[Mapping]]) -> dict:
        """Predict the throughput of the servers between the first and the ideal one.

        It takes ``servers`` of `predict`, ``layer_us`` of `layer_times`, and ``step_tokens``.
        """
        tokens = step_tokens(workload, WORKLOADS[workload])
        layers = self._layer_times(workload, tokens, rounds)
        measured = {
            name: float(np.median([r["tokens_per_s"] for r in rows]))
            for name, rows in rounds.items()
        }
        return {
            "step_tokens": tokens,
            "layer_us": layers,
            "servers": predict(layers, measured, self.first),
        }

    def layers(self, load: str, profiles: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
        """Return `predict_layers` of what was profiled under one of `kernels.LOADS`."""
        asked = LOADS[load]
        tokens = step_tokens(load, asked)
        if load == "decode":  # all steps alike, however many
            steps, measured = (
                1.0,
                {name: len(self.model.moe_layers) * of["experts"] for name, of in profiles.items()},
            )
        else:  # as many tokens in every server, however they were cut into steps
            steps, measured = (
                asked.requests * asked.prompt / tokens,
                {name: of["experts_total"] for name, of in profiles.items()},
            )
        times = {
            name: steps * time for name, time in self._layer_times(load, tokens, measured).items()
        }
        return predict_layers(times, measured, self.first)

    def _layer_times(
        self, workload: str, tokens: int, servers: Mapping[str, object]
    ) -> dict[str, float]:
        even = get_strategy("linear").place(Cluster(Topology.even(self.ranks)).request(self.load))
        placed = {name: placement for name, placement in self.placed.items() if name in servers}
        return layer_times(
            placed, self.load.total, even, tokens, self.model.top_k, cost_of(workload, self.costs)
        )
