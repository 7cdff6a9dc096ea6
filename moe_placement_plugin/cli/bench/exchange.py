"""Offer ``moe-placement bench exchange``: experts that move between processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonPath, VllmPython, progress_lines

if TYPE_CHECKING:
    import numpy as np

HELP = (
    "Move experts between eight processes: after the death of some, against a full reload; and "
    "bytes moved over drifting windows.\n\n"
    "Example: moe-placement bench exchange --trace examples/deepseek-r1 --json exchange.json"
)


@dataclass(frozen=True)
class ExchangeOptions:
    """Hold what the command line asks of ``bench exchange``.

    Attributes:
        traces: recorded loads, or folders of them.
        suites: names of suites; empty for all that have what they need.
        dead: most ranks that die.
        replicas: copies of each expert; None for 2 and 3.
        layers: MoE layers of the made-up model.
        hidden: its hidden size.
        width: intermediate size of its experts.
        sent: whether experts are sent rather than read in their ranks' memory.
        folder: where its checkpoint is written, None for the temporary folder.
        vllm_python: interpreter that has vLLM, None for this one.
        repeats: runs per case.
    """

    traces: list[Path]
    suites: list[str]
    dead: int
    replicas: list[int] | None
    layers: int
    hidden: int
    width: int
    sent: bool
    folder: Path | None
    vllm_python: str | None
    repeats: int


def bench_exchange(
    traces: Annotated[
        list[Path] | None,
        typer.Option(
            "--trace", help="Recorded load of DeepSeek-R1's shape, or a folder of them; repeat."
        ),
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="dead or drift; repeat.")
    ] = None,
    dead: Annotated[
        int, typer.Option("--dead", help="Most ranks of the eight that die.", min=1, max=4)
    ] = 4,
    replicas: Annotated[
        list[int] | None,
        typer.Option("--replicas", help="Copies of each expert (2 and 3); repeat.", min=2, max=8),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", help="MoE layers of the made-up model.", min=1)
    ] = 4,
    hidden: Annotated[int, typer.Option("--hidden", help="Its hidden size.", min=16)] = 512,
    width: Annotated[
        int, typer.Option("--width", help="Intermediate size of its experts.", min=16)
    ] = 512,
    sent: Annotated[
        bool,
        typer.Option(
            "--sent",
            help="Send experts, as between hosts, rather than read them in the memory of their "
            "ranks.",
        ),
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where its checkpoint is written; the temporary folder if left out."
        ),
    ] = None,
    vllm_python: VllmPython = None,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Runs per case; the median counts.", min=1)
    ] = 3,
    json_path: JsonPath = None,
) -> None:
    """Run ``bench exchange``: measure, print, write."""
    import json

    from rich.console import Console

    from ...lab.bench.exchange.report import print_report  # lazy: heavy

    options = ExchangeOptions(
        traces=traces or [],
        suites=suite or [],
        dead=dead,
        replicas=replicas,
        layers=layers,
        hidden=hidden,
        width=width,
        sent=sent,
        folder=folder,
        vllm_python=vllm_python,
        repeats=repeats,
    )
    result = _measure(options)
    print_report(result, Console(width=250))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))


def _measure(options: ExchangeOptions) -> dict[str, Any]:
    """Run every suite that is asked for."""
    from ...lab.bench.planner.run import machine, read_traces  # lazy: numba

    wanted = _check_suites(options)
    loads = read_traces(options.traces)
    _, report = progress_lines()
    result: dict[str, Any] = {"machine": machine(), "versions": {}, "missing": {}}
    if "dead" in wanted:
        _dead(options, result, report)
    if "drift" in wanted:
        _drift(options, loads, result, report)
    return result


def _check_suites(options: ExchangeOptions) -> list[str]:
    """Return the suites to run.

    Raises:
        PlacementError: when one is unknown or has not what it needs.
    """
    from importlib.util import find_spec

    from ...core.errors import PlacementError  # lazy: heavy
    from ...lab.bench.exchange.run import SUITES  # lazy: numba

    wanted = options.suites or ["dead", *(["drift"] if options.traces else [])]
    for name in wanted:
        if name not in SUITES:
            raise PlacementError(f"--suite {name}: choose from {', '.join(SUITES)}")
    if "drift" in wanted and not options.traces:
        raise PlacementError("--suite drift needs recorded loads: give --trace")
    if "dead" in wanted and find_spec("torch") is None:
        raise PlacementError(
            "--suite dead moves tensors over torch.distributed, and torch is not installed here: "
            "run it where the engine is"
        )
    return wanted


def _dead(options: ExchangeOptions, result: dict[str, Any], report: Callable[[str], None]) -> None:
    """Add what ranks that die cost to the result."""
    from dataclasses import asdict

    import torch

    from ...lab.bench.exchange import run as engine  # lazy: numba
    from ...lab.bench.exchange.ranks import Sizes  # lazy: heavy

    sizes = Sizes(options.layers, 64, options.hidden, options.width)
    result["versions"]["exchange"] = {"torch": torch.__version__, "backend": "gloo"}
    result["sizes"] = asdict(sizes) | {"expert_bytes": sizes.expert_bytes}
    result["dead"] = engine.dead_suite(
        sizes,
        options.dead,
        options.replicas or (2, 3),
        report,
        options.repeats,
        options.folder,
        not options.sent,
    )


def _drift(
    options: ExchangeOptions,
    loads: dict[str, np.ndarray],
    result: dict[str, Any],
    report: Callable[[str], None],
) -> None:
    """Add what moves while the load drifts to the result, beside vLLM's planner where it is."""
    from ...lab.bench.exchange import run as engine  # lazy: numba
    from ...lab.bench.planner.contestants import start_contestants  # lazy: heavy

    contestants, missing = start_contestants(["vLLM default"], {"vllm": options.vllm_python})
    result["missing"] = missing
    result["versions"] |= {c.name: c.versions for c in contestants}
    try:
        result["drift"] = engine.drift_suite(loads, contestants[0] if contestants else None, report)
    finally:
        for contestant in contestants:
            contestant.close()
