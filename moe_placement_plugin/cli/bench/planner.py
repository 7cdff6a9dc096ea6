"""Offer ``moe-placement bench planner``: planners side by side."""

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
    "Compare planners: this package's, vLLM's, SGLang's (both imported as installed) and "
    "DeepSeek's algorithm.\n\n"
    "Each planner runs in a process of its own, under the interpreter that has it, one case after "
    "the other in the same run.\n\n"
    "Example: moe-placement bench planner --trace examples/deepseek-r1 "
    "--sglang-python ~/sglang/bin/python --json planner.json"
)


@dataclass(frozen=True)
class PlannerOptions:
    """Hold what the command line asks of ``bench planner``.

    Attributes:
        traces: recorded loads, or folders of them.
        tokens: token-level traces.
        suites: names of suites; empty for all that have what they need.
        pythons: engine -> interpreter that has it, None for this one.
        layers: layers of each synthetic load.
        repeats: timed calls per case.
    """

    traces: list[Path]
    tokens: list[Path]
    suites: list[str]
    pythons: dict[str, str | None]
    layers: int
    repeats: int


def bench_planner(
    traces: Annotated[
        list[Path] | None,
        typer.Option("--trace", help="Recorded load, or a folder of them; repeat."),
    ] = None,
    tokens: Annotated[
        list[Path] | None,
        typer.Option("--tokens", help="Token-level trace (.npz with topk_ids); repeat."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite", help="traces, synthetic, moves, workloads, locality or coactivation; repeat."
        ),
    ] = None,
    vllm_python: VllmPython = None,
    sglang_python: Annotated[
        str | None,
        typer.Option("--sglang-python", help="Interpreter that has SGLang, if this one has not."),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", help="Layers of each synthetic load.", min=1)
    ] = 4,
    repeats: Annotated[
        int, typer.Option("--repeats", help="Timed calls per case; the median counts.", min=1)
    ] = 7,
    json_path: JsonPath = None,
) -> None:
    """Run ``bench planner``: measure, print, write."""
    import json

    from rich.console import Console

    from ...lab.bench.planner.report import print_report  # lazy: heavy

    pythons = {"vllm": vllm_python, "sglang": sglang_python}
    result = _measure(
        PlannerOptions(traces or [], tokens or [], suite or [], pythons, layers, repeats)
    )
    print_report(result, Console(width=260))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))


def _measure(options: PlannerOptions) -> dict[str, Any]:
    """Run every suite that is asked for, each with all planners that can be started."""
    from contextlib import ExitStack

    from ...lab.bench.planner import run as engine  # lazy: numba
    from ...lab.bench.planner.contestants import start_contestants  # lazy: heavy

    wanted = _check_suites(options)
    loads = engine.read_traces(options.traces)
    _check_loads(wanted, loads)
    head, report = progress_lines()
    with ExitStack() as stack:
        contestants, missing = start_contestants([*engine.FRESH, "replan"], options.pythons)
        for contestant in contestants:
            stack.enter_context(contestant)
        result: dict[str, Any] = {
            "machine": engine.machine(),
            "versions": {c.name: c.versions for c in contestants},
            "missing": missing,
        }
        runs = _suites(options, contestants, loads, report)
        for name in engine.SUITES:
            if name in wanted:
                head(name)
                result[name] = runs[name]()
    return result


def _suites(
    options: PlannerOptions,
    contestants: list[Any],
    loads: dict[str, np.ndarray],
    report: Callable[[str], None],
) -> dict[str, Callable[[], Any]]:
    """Bind every suite to what it measures: name -> what runs it and returns its rows."""
    from ...lab.bench.planner import run as engine  # lazy: numba

    by_name = {c.name: c for c in contestants}
    fresh = [c for c in contestants if c.name != "replan"]
    repeats, few = options.repeats, min(options.repeats, 3)
    return {
        "traces": lambda: engine.traces_suite(fresh, loads, repeats, report),
        "synthetic": lambda: engine.synthetic_suite(fresh, options.layers, few, report),
        "moves": lambda: engine.moves_suite(by_name, loads, few, report),
        "workloads": lambda: engine.workloads_suite(by_name, loads, report),
        "locality": lambda: engine.locality_suite(loads, report),
        "coactivation": lambda: engine.coactivation_suite(options.tokens, report),
    }


def _check_suites(options: PlannerOptions) -> list[str]:
    """Return the suites to run.

    Raises:
        PlacementError: when one is unknown or has not what it plans from.
    """
    from ...core.errors import PlacementError  # lazy: heavy
    from ...lab.bench.planner.run import SUITES  # lazy: numba

    traces, tokens = options.traces, options.tokens
    wanted = options.suites or [
        s
        for s in SUITES
        if (s == "synthetic" or (tokens if s == "coactivation" else traces or s == "moves"))
    ]
    for name in wanted:
        if name not in SUITES:
            raise PlacementError(f"--suite {name}: choose from {', '.join(SUITES)}")
        if name in ("traces", "workloads", "locality") and not traces:
            raise PlacementError(f"--suite {name} needs recorded loads: give --trace")
        if name == "coactivation" and not tokens:
            raise PlacementError("--suite coactivation needs token-level traces: give --tokens")
    return wanted


def _check_loads(wanted: list[str], loads: dict[str, np.ndarray]) -> None:
    """Refuse a suite that has too few loads.

    Raises:
        PlacementError: naming how many it needs.
    """
    from ...core.errors import PlacementError  # lazy: heavy

    if "workloads" in wanted and len(loads) < 5:
        raise PlacementError(
            "--suite workloads plans on four loads and judges on others: "
            f"{len(loads)} given; give five or more"
        )
