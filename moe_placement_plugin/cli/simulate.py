"""``moe-placement simulate``: strategies side by side, before anything is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..core.placement import Placement
    from ..strategies import Strategy

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def simulate(
    loads: Annotated[
        list[Path],
        typer.Argument(help="Recorded loads of one model, one per workload.", metavar="LOAD"),
    ],
    ranks: Annotated[int, typer.Option("--ranks", help="Expert parallel ranks.", min=1)],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="Strategy to compare; repeat. The first is what others are compared with.",
        ),
    ] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="Plan file to compare too; repeat.")
    ] = None,
    redundant: Annotated[
        int, typer.Option("--redundant", help="Redundant experts per layer.", min=0)
    ] = 0,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes that the ranks lie on.", min=1)] = 1,
    groups: Annotated[
        int, typer.Option("--groups", help="Expert groups of grouped top-k routing.", min=1)
    ] = 1,
    speed: Annotated[
        str | None, typer.Option("--speed", help="Relative speed of each rank: 1,1,0.5,...")
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option("--phase", help="Use only windows of this phase: prefill, decode or mixed."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="Cost model of your device: a file, or the name of a shipped one. Without it no times.",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens-per-step", help="Tokens of a step over all ranks, for times.", min=1
        ),
    ] = 4096,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k", help="Experts per token, for times (default: as recorded, else 8).", min=1
        ),
    ] = None,
    all_gather: Annotated[
        bool,
        typer.Option(
            "--all-gather",
            help="Every rank gets all tokens, not only those with a choice there, for times.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare strategies on recorded loads: on the load itself, on the window after it, and across workloads.

    Says plainly when balance buys nothing. With a calibration it also predicts the time of the MoE layers, and states
    the calibration's error on measurements that it was not fitted to.

    Example: moe-placement simulate a.safetensors b.safetensors --ranks 32 --redundant 32
    """
    from ..core.errors import PlacementError  # lazy: heavy
    from ..simulation.costmodel import find_calibration, fit  # lazy: heavy
    from ..simulation.simulate import simulate as run  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .inputs import cluster, print_json, read_loads, read_plan  # lazy: heavy

    where = cluster(ranks, nodes, redundant, groups, speed)
    workloads = read_loads(loads, phase)
    candidates: dict[str, Strategy | Placement] = {
        name: get_strategy(name) for name in (strategy or ["linear", "zigzag", "eplb"])
    }
    for path in plans or []:
        plan = read_plan(path, ranks)
        if plan.num_ranks != ranks:
            raise PlacementError(
                f"{path} is a plan for {plan.num_ranks} EP ranks, --ranks is {ranks}: plan for {ranks} ranks"
            )
        candidates[path.name] = plan
    cost = None
    if calibration is not None:
        measured = find_calibration(calibration)
        cost = fit(measured.measurements)
    if top_k is None:
        top_k = next(
            (w.load.metadata["top_k"] for w in workloads if w.load.metadata.get("top_k")), 8
        )
    found = run(workloads, candidates, where, cost, tokens, top_k, all_gather)
    if as_json:
        print_json(
            {
                "workloads": [w.name for w in found.workloads],
                "layer_ids": found.workloads[0].load.layer_ids,
                "dead_zone": found.dead_zone,
                "best": found.best.name,
                "verdict": found.verdict(),
                "cost_model": None
                if cost is None
                else vars(cost) | {"device": measured.device, "layer": measured.layer},
                "outcomes": [
                    {
                        "name": o.name,
                        "balancedness": o.overall,
                        "max_over_mean": o.max_over_mean,
                        "per_layer": o.per_layer,
                        "per_window": o.per_window,
                        "next_window": o.next_window,
                        "served": o.served,
                        "step": None
                        if o.step is None
                        else {
                            "tokens": o.step.tokens,
                            "layer_us": o.step.layer_us,
                            "ideal_us": o.step.ideal_us,
                            "total_us": o.step.total_us,
                        },
                    }
                    for o in found.outcomes
                ],
            }
        )
        return
    from ..report.tables import console, simulation_table  # lazy: heavy

    out = console()
    if cost is not None:
        out.print(f"Times: {measured.summary}; {cost.accuracy}")
    out.print(simulation_table(found))
