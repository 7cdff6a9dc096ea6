"""Read what several verbs read (loads, plans, clusters), and print as they print."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..core.topology import Topology
from ..formats.plan_or_load import read
from ..simulation.cluster import Cluster, Workload


def read_plan(path: Path, num_ranks: int | None = None) -> Placement:
    """Read a plan.

    Raises:
        PlacementError: when the file is none.
    """
    found = read(path, num_ranks)
    if isinstance(found, ExpertLoad):
        raise PlacementError(
            f"{path} is a recorded load, a plan is needed: make one with `moe-placement plan "
            f"{path}`"
        )
    return found


def read_loads(paths: Sequence[Path], phase: str | None = None) -> list[Workload]:
    """Read recorded loads, named by their files.

    Args:
        paths: the files.
        phase: keep only windows of this phase.

    Raises:
        PlacementError: when one is no load, or has no window of the phase.
    """
    workloads = []
    for path in paths:
        load = read(path)
        if isinstance(load, Placement):
            raise PlacementError(
                f"{path} is a plan, a recorded load is needed: give what --expert-load-record wrote"
            )
        try:
            load.require_tokens()
        except PlacementError as error:
            raise PlacementError(f"{path}: {error}") from None
        if phase is not None:
            keep = [i for i, p in enumerate(load.phases) if p == phase]
            if not keep:
                raise PlacementError(
                    f"{path} has no window of phase {phase} (it has "
                    f"{', '.join(sorted(set(load.phases)))}): leave --phase out"
                )
            load = ExpertLoad(
                load.counts[keep],
                load.layer_ids,
                tuple(load.phases[i] for i in keep),
                load.coactivation,
                load.metadata,
            )
        workloads.append(Workload(_name(path, paths), load))
    return workloads


def _name(path: Path, paths: Sequence[Path]) -> str:
    return path.stem if sum(p.stem == path.stem for p in paths) == 1 else str(path)


def cluster(
    ranks: int, nodes: int, redundant: int, groups: int, speed: str | None, locality: str = "none"
) -> Cluster:
    """Return the cluster that the options describe.

    Raises:
        PlacementError: when the numbers do not fit together.
    """
    topology = Topology.even(ranks, nodes)
    if speed:
        try:
            speeds = tuple(float(s) for s in speed.split(","))
        except ValueError:
            raise PlacementError(
                f"--speed {speed}: give one number per rank, separated by commas"
            ) from None
        topology = Topology(ranks, topology.node_of_rank, speeds)
    return Cluster(topology, redundant, groups, locality)


def check_writable(path: Path) -> None:
    """Refuse an output path before work is spent on it.

    Raises:
        PlacementError: when its directory is missing.
    """
    if path.is_dir():
        raise PlacementError(f"{path} is a directory: give the path of a file")
    if not path.parent.is_dir():
        raise PlacementError(
            f"{path} cannot be written (directory {path.parent} does not exist): make it, or give "
            "a writable path"
        )


def print_json(data: Any) -> None:
    """Print data as one JSON document on stdout; numbers that JSON lacks become null."""
    typer.echo(json.dumps(_finite(data)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
