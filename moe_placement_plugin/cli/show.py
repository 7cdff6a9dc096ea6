"""``moe-placement show``: loads and plans, in the terminal, as a page, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.load import ExpertLoad
    from ..core.placement import Placement
    from ..simulation.cluster import Workload

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def show(
    files: Annotated[
        list[Path], typer.Argument(help="Recorded loads, plans, or both.", metavar="FILE")
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            help="EP ranks to show strategies for (default: the plan's). Without ranks only the load is shown.",
            min=1,
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="Strategy to show beside the plans; repeat (default: linear and zigzag, or with no plan also eplb).",
        ),
    ] = None,
    redundant: Annotated[
        int,
        typer.Option(
            "--redundant",
            help="Redundant experts that strategies have (default: the plan's).",
            min=-1,
        ),
    ] = -1,
    phase: Annotated[
        str | None,
        typer.Option("--phase", help="Use only windows of this phase: prefill, decode or mixed."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write one self-contained HTML page.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", help="Write each figure as PNG into this folder (needs the extra 'report')."
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="Layer whose co-activation is drawn (default: the most skewed).", min=0
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="List every layer, not only the worst.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a load, a plan, or what a plan does to a load.

    Example: moe-placement show load.safetensors plan.json --html report.html
    """
    from ..core.errors import PlacementError  # lazy: heavy
    from ..core.placement import Placement  # lazy: heavy
    from ..formats.plan_or_load import read  # lazy: heavy
    from ..report.tables import console, load_table, plan_table  # lazy: heavy
    from ..simulation.cluster import align, rows_for  # lazy: heavy
    from .inputs import check_writable, print_json, read_loads  # lazy: heavy

    if page is not None:
        check_writable(page)
    plans: dict[str, Placement] = {}
    load_paths = []
    for path in files:
        found = read(path, ranks)
        if isinstance(found, Placement):
            plans[path.stem if path.stem not in plans else str(path)] = found
        else:
            load_paths.append(path)
    workloads = align(read_loads(load_paths, phase)) if load_paths else []
    if not workloads:
        if page is not None or png is not None:
            raise PlacementError(
                "--html and --png draw a load, and only plans were given: add a recorded load"
            )
        if as_json:
            print_json({"plans": {name: _plan_facts(plan) for name, plan in plans.items()}})
            return
        for name, plan in plans.items():
            console().print(plan_table(plan, name))
        return

    together = _together(workloads)
    plans = {name: rows_for(plan, together, name) for name, plan in plans.items()}
    placements = {**_strategies(together, ranks, redundant, strategy, plans), **plans}
    if page is not None or png is not None:
        from ..report.data import make_report  # lazy: heavy

        report = make_report(
            [w.name for w in workloads], [w.load for w in workloads], placements, layer
        )
        if page is not None:
            from ..formats.atomic import write_atomically  # lazy: heavy
            from ..report.page import render  # lazy: heavy

            write_atomically(page, render(report).encode())
        if png is not None:
            from ..report.figures import write_figures  # lazy: heavy

            write_figures(report, png)
    if as_json:
        print_json(
            {
                "loads": {w.name: _load_facts(w.load) for w in workloads},
                "plans": {name: _plan_facts(plan) for name, plan in plans.items()},
                "balancedness": {
                    name: {
                        "overall": plan.overall_balancedness(together.counts),
                        "per_layer": plan.balancedness(together.total),
                    }
                    for name, plan in placements.items()
                },
                "html": page and str(page),
                "png": png and str(png),
            }
        )
        return
    out = console()
    limit = None if every else 12
    for workload in workloads:
        out.print(load_table(workload, limit))
        out.print()
    for name, plan in placements.items():
        if name in plans:
            out.print(plan_table(plan, name, together.total, plan.num_layers if every else 8))
        else:
            out.print(
                f"{name}: balancedness {plan.overall_balancedness(together.counts):.4f} on {plan.num_ranks} ranks"
            )
        out.print()
    for written in (page, png):
        if written is not None:
            out.print(f"{written} written")


def _together(workloads: Sequence[Workload]) -> ExpertLoad:
    from ..core.load import ExpertLoad  # lazy: heavy

    return ExpertLoad.concatenate([w.load for w in workloads])


def _strategies(
    load: ExpertLoad,
    ranks: int | None,
    redundant: int,
    names: Sequence[str] | None,
    plans: Mapping[str, Placement],
) -> dict[str, Placement]:
    """The strategies to show beside the plans, on the same ranks and slots."""
    from ..core.topology import Topology  # lazy: heavy
    from ..strategies import PlacementRequest, get_strategy  # lazy: heavy

    first = next(iter(plans.values()), None)
    if ranks is None:
        ranks = first.num_ranks if first is not None else None
    if ranks is None:
        if names:
            from ..core.errors import PlacementError  # lazy: heavy

            raise PlacementError(
                f"--strategy {names[0]} without --ranks: strategies place experts on ranks; add --ranks"
            )
        return {}
    if redundant < 0:
        redundant = first.num_redundant if first is not None and first.num_ranks == ranks else 0
    slots = (
        first.slots_per_rank
        if first is not None and (first.num_ranks, first.num_redundant) == (ranks, redundant)
        else ()
    )
    names = names or (["linear", "zigzag"] if plans else ["linear", "zigzag", "eplb"])
    request = PlacementRequest(
        load.num_layers,
        load.num_experts,
        Topology(ranks),
        redundant,
        slots,
        load.layer_ids,
        load=load,
    )
    return {name: get_strategy(name).place(request) for name in names if name not in plans}


def _load_facts(load: ExpertLoad) -> dict[str, Any]:
    return {
        "layer_ids": load.layer_ids,
        "experts": load.num_experts,
        "phases": load.phases,
        "tokens": load.total.sum(axis=1),
        "max_over_mean": load.total.max(axis=1) / load.total.mean(axis=1).clip(1e-12),
        "hottest": load.total.argsort(axis=1)[:, ::-1][:, :3],
        "coactivation": load.coactivation is not None,
        "metadata": dict(load.metadata),
    }


def _plan_facts(plan: Placement) -> dict[str, Any]:
    return {
        "strategy": plan.strategy,
        "digest": plan.digest,
        "layer_ids": plan.layer_ids,
        "experts": plan.num_logical_experts,
        "slots_per_rank": plan.slots_per_rank,
        "redundant": plan.num_redundant,
        "most_copies": int(plan.replica_counts.max()),
        "metadata": dict(plan.metadata),
    }
