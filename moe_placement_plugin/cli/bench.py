"""``moe-placement bench``: measurements on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure planners and layers on this machine.", add_completion=False, no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure planners and layers on this machine."""


@app.command()
def planner(
    traces: Annotated[list[Path] | None, typer.Option("--trace", help="Recorded load, or a folder of them; repeat.")] = None,
    tokens: Annotated[list[Path] | None, typer.Option("--tokens", help="Token-level trace (.npz with topk_ids); repeat.")] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="traces, synthetic, moves, workloads, locality or coactivation; repeat.")
    ] = None,
    vllm_python: Annotated[str | None, typer.Option("--vllm-python", help="Interpreter that has vLLM, if this one has not.")] = None,
    sglang_python: Annotated[
        str | None, typer.Option("--sglang-python", help="Interpreter that has SGLang, if this one has not.")
    ] = None,
    layers: Annotated[int, typer.Option("--layers", help="Layers of each synthetic load.", min=1)] = 4,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls per case; the median counts.", min=1)] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Compare planners: this package's, vLLM's, SGLang's (both imported as installed) and DeepSeek's algorithm.

    Each planner runs in a process of its own, under the interpreter that has it, one case after the other in the same run.

    Example: moe-placement bench planner --trace traces/ --sglang-python ~/sglang/bin/python --json planner.json
    """
    import json
    from contextlib import ExitStack

    from rich.console import Console

    from ..bench import planner as engine
    from ..bench.planner_contestants import start_contestants
    from ..bench.planner_report import print_report
    from ..errors import PlacementError

    wanted = suite or [s for s in engine.SUITES if (s == "synthetic" or (tokens if s == "coactivation" else traces or s == "moves"))]
    for name in wanted:
        if name not in engine.SUITES:
            raise PlacementError(f"--suite {name}: choose from {', '.join(engine.SUITES)}")
        if name in ("traces", "workloads", "locality") and not traces:
            raise PlacementError(f"--suite {name} needs recorded loads: give --trace")
        if name == "coactivation" and not tokens:
            raise PlacementError("--suite coactivation needs token-level traces: give --tokens")
    loads = engine.read_traces(traces or [])
    if "workloads" in wanted and len(loads) < 5:
        raise PlacementError(f"--suite workloads plans on four loads and judges on others: {len(loads)} given; give five or more")
    progress = Console(stderr=True)

    def report(text: str) -> None:
        progress.print(f"  {text}", highlight=False)

    with ExitStack() as stack:
        contestants, missing = start_contestants([*engine.FRESH, "replan"], {"vllm": vllm_python, "sglang": sglang_python})
        for contestant in contestants:
            stack.enter_context(contestant)
        by_name = {c.name: c for c in contestants}
        fresh = [c for c in contestants if c.name != "replan"]
        result: dict = {"machine": engine.machine(), "versions": {c.name: c.versions for c in contestants}, "missing": missing}
        runs = {
            "traces": lambda: engine.traces_suite(fresh, loads, repeats, report),
            "synthetic": lambda: engine.synthetic_suite(fresh, layers, min(repeats, 3), report),
            "moves": lambda: engine.moves_suite(by_name, loads, min(repeats, 3), report),
            "workloads": lambda: engine.workloads_suite(by_name, loads, report),
            "locality": lambda: engine.locality_suite(loads, report),
            "coactivation": lambda: engine.coactivation_suite(tokens or [], report),
        }
        for name in engine.SUITES:
            if name in wanted:
                progress.print(name)
                result[name] = runs[name]()
    print_report(result, Console(width=260))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))
