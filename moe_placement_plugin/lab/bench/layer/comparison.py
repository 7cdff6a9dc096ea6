"""Compare strategies at every number of ranks and batch size that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....core.errors import PlacementError
from ....core.load import ExpertLoad
from ....formats.atomic import write_atomically
from ....simulation.costmodel import Calibration
from ...staged_layer import find_matmuls
from ..timing import device_facts
from .report import as_json
from .run import LayerBench, LayerTimes, plan_all
from .shapes import LayerShape, find_shape, read_recordings, synthetic_load


@dataclass(frozen=True)
class LayerOptions:
    """Hold what the command line asks of ``bench layer``.

    Attributes:
        shape: name of the layer's shape.
        loads: recorded loads that steps are drawn from; empty for a synthetic one.
        plan_on: recorded loads to plan on instead; empty for the same.
        ranks: numbers of EP ranks.
        strategies: names, ``eplb+32`` for 32 redundant experts.
        prefill: prefill tokens per rank, 0 for none.
        decode: decode tokens per rank, 0 for none.
        layers: layers of the load to measure.
        repeats: timed runs of each share.
        skew: exponent of the synthetic load's Zipf law.
        matmuls: who multiplies.
        device: where; empty for a GPU if there is one.
        use_ring: rows as after an all-gather.
        calibrations: folder for calibration files, or None.
        json_path: file for all figures, or None.
    """

    shape: str
    loads: list[Path]
    plan_on: list[Path]
    ranks: list[int]
    strategies: list[str]
    prefill: list[int]
    decode: list[int]
    layers: int
    repeats: int
    skew: float
    matmuls: str
    device: str
    use_ring: bool
    calibrations: Path | None
    json_path: Path | None

    @property
    def batches(self) -> list[tuple[str, int]]:
        """Return (phase, tokens per rank) of every batch."""
        sizes = (("prefill", self.prefill), ("decode", self.decode))
        return [(phase, tokens) for phase, each in sizes for tokens in each if tokens]


@dataclass
class LayerComparison:
    """Hold what was measured.

    Attributes:
        facts: device, versions, kernel and loads, for reports.
        times: a row for each strategy, number of ranks and batch.
        calibrations: phase -> the measurements in the form that ``simulate`` reads.
    """

    facts: dict[str, Any]
    times: list[LayerTimes] = field(default_factory=list)
    calibrations: dict[str, Calibration] = field(default_factory=dict)


def find_device(name: str) -> torch.device:
    """Return the device to measure on; a GPU if there is one and the name is empty.

    Raises:
        PlacementError: when a GPU is asked for and there is none.
    """
    where = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise PlacementError(
            f"--device {name}: torch {torch.__version__} finds no GPU here; "
            "leave --device out or give cpu"
        )
    return where


def compare_strategies(
    options: LayerOptions, command: str, report: Callable[[str], None]
) -> LayerComparison:
    """Measure all strategies; files are written after every number of ranks.

    Args:
        options: what is asked.
        command: the command line, kept in the calibrations.
        report: takes a line of progress.

    Raises:
        PlacementError: when a load, a strategy or the device's memory does not fit.
    """
    where = find_device(options.device)
    shape = find_shape(options.shape)
    load, planned = _loads(options, shape)
    rows = np.linspace(0, load.num_layers - 1, min(options.layers, load.num_layers))
    bench = LayerBench(
        options.shape,
        shape,
        where,
        find_matmuls(options.matmuls, where),
        options.repeats,
        options.use_ring,
    )
    found = LayerComparison(_facts(options, bench, load))
    for ranks in options.ranks:
        plans = plan_all(options.strategies, planned, ranks, shape.groups)
        for phase, tokens in options.batches:
            found.times += bench.measure(
                plans, load, sorted({int(row) for row in rows}), phase, tokens, report
            )
        found.calibrations = {
            phase: bench.calibration(phase, found.facts, command) for phase in dict(options.batches)
        }
        # After every number of ranks: a run that is cut short has measured something.
        _write(found, options)
    return found


def _loads(options: LayerOptions, shape: LayerShape) -> tuple[ExpertLoad, ExpertLoad]:
    """Return the load that steps are drawn from, and the one that is planned on."""
    if options.loads:
        load = read_recordings(options.loads, shape, options.shape)
    else:
        load = synthetic_load(shape, options.skew)
    if not options.plan_on:
        return load, load
    planned = read_recordings(options.plan_on, shape, options.shape)
    return load, planned.select_layers(load.layer_ids)


def _facts(options: LayerOptions, bench: LayerBench, load: ExpertLoad) -> dict[str, Any]:
    """Describe what is measured, for reports and calibrations."""

    def names(paths: list[Path]) -> str:
        return ", ".join(path.name for path in paths)

    return {
        **device_facts(bench.device),
        "kernel": bench.matmuls.name,
        "rows": "all-gather" if options.use_ring else "all-to-all",
        "load": names(options.loads) if options.loads else load.metadata["source"],
        "planned on": names(options.plan_on) if options.plan_on else "the same",
    }


def _write(found: LayerComparison, options: LayerOptions) -> None:
    """Write the calibrations and the figures that there are so far."""
    if options.calibrations is not None:
        for phase, calibration in found.calibrations.items():
            calibration.write(options.calibrations / f"{options.shape}-{phase}.json")
    if options.json_path is not None:
        data = {"facts": found.facts, "outcomes": as_json(found.times)}
        write_atomically(options.json_path, json.dumps(data, indent=1).encode())
