"""Offer ``moe-placement show``: loads and plans, in the terminal, as a page, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..core.load import ExpertLoad
    from ..core.placement import Placement
    from ..simulation.cluster import Workload

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class ShowOptions:
    """Hold what the command line asks of ``show``.

    Attributes:
        files: recorded loads, plans, or both.
        ranks: EP ranks to show strategies for, None for the plan's.
        strategies: strategies to show beside the plans, None for the usual ones.
        redundant: redundant experts that strategies have, -1 for the plan's.
        phase: phase of the windows to use, None for all.
        page: HTML file to write, or None.
        png: folder for PNG files, or None.
        layer: layer whose co-activation is drawn, None for the most skewed.
        every: whether every layer is listed.
        as_json: whether JSON is printed.
    """

    files: list[Path]
    ranks: int | None
    strategies: Sequence[str] | None
    redundant: int
    phase: str | None
    page: Path | None
    png: Path | None
    layer: int | None
    every: bool
    as_json: bool


@dataclass(frozen=True)
class Shown:
    """Hold what is shown.

    Attributes:
        workloads: the loads.
        together: all of them as one.
        plans: name -> plan, of those that were given.
        placements: name -> placement, of strategies and plans.
    """

    workloads: list[Workload]
    together: ExpertLoad
    plans: dict[str, Placement]
    placements: dict[str, Placement]


@app.command()
def show(
    files: Annotated[
        list[Path], typer.Argument(help="Recorded loads, plans, or both.", metavar="FILE")
    ],
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            help="EP ranks to show strategies for (default: the plan's). Without ranks only the "
            "load is shown.",
            min=1,
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            "--strategy",
            help="Strategy to show beside the plans; repeat (default: linear and zigzag, or with "
            "no plan also eplb).",
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
    from .inputs import check_writable  # lazy: heavy

    options = ShowOptions(
        files=files,
        ranks=ranks,
        strategies=strategy,
        redundant=redundant,
        phase=phase,
        page=page,
        png=png,
        layer=layer,
        every=every,
        as_json=as_json,
    )
    if page is not None:
        check_writable(page)
    plans, workloads = _read(options)
    if not workloads:
        _show_plans(plans, options)
        return
    shown = _place(plans, workloads, options)
    _draw(shown, options)
    if as_json:
        _print_json(shown, options)
    else:
        _print_tables(shown, options)


def _read(options: ShowOptions) -> tuple[dict[str, Placement], list[Workload]]:
    """Return the files' plans by name, and their loads aligned to the same layers."""
    from ..core.placement import Placement  # lazy: heavy
    from ..formats.plan_or_load import read  # lazy: heavy
    from ..simulation.cluster import align  # lazy: heavy
    from .inputs import read_loads  # lazy: heavy

    plans: dict[str, Placement] = {}
    load_paths = []
    for path in options.files:
        found = read(path, options.ranks)
        if isinstance(found, Placement):
            plans[path.stem if path.stem not in plans else str(path)] = found
        else:
            load_paths.append(path)
    return plans, align(read_loads(load_paths, options.phase)) if load_paths else []


def _show_plans(plans: dict[str, Placement], options: ShowOptions) -> None:
    """Print plans without a load.

    Raises:
        PlacementError: when something is to be drawn.
    """
    from ..core.errors import PlacementError  # lazy: heavy
    from ..report.tables import console, plan_table  # lazy: heavy

    if options.page is not None or options.png is not None:
        raise PlacementError(
            "--html and --png draw a load, and only plans were given: add a recorded load"
        )
    if options.as_json:
        from ..report.data import plan_facts  # lazy: heavy
        from .inputs import print_json  # lazy: heavy

        print_json({"plans": {name: plan_facts(plan) for name, plan in plans.items()}})
        return
    for name, plan in plans.items():
        console().print(plan_table(plan, name))


def _place(plans: dict[str, Placement], workloads: list[Workload], options: ShowOptions) -> Shown:
    """Add the strategies that are shown beside the plans."""
    from ..core.load import ExpertLoad  # lazy: heavy
    from ..simulation.cluster import rows_for  # lazy: heavy

    together = ExpertLoad.concatenate([w.load for w in workloads])
    plans = {name: rows_for(plan, together, name) for name, plan in plans.items()}
    return Shown(workloads, together, plans, {**_strategies(together, plans, options), **plans})


def _draw(shown: Shown, options: ShowOptions) -> None:
    """Write the page and the figures that are asked for."""
    if options.page is None and options.png is None:
        return
    from ..report.data import make_report  # lazy: heavy

    names = [w.name for w in shown.workloads]
    loads = [w.load for w in shown.workloads]
    report = make_report(names, loads, shown.placements, options.layer)
    if options.page is not None:
        from ..formats.atomic import write_atomically  # lazy: heavy
        from ..report.page import render  # lazy: heavy

        write_atomically(options.page, render(report).encode())
    if options.png is not None:
        from ..report.figures import write_figures  # lazy: heavy

        write_figures(report, options.png)


def _print_json(shown: Shown, options: ShowOptions) -> None:
    """Print facts on loads, plans and balancedness, and what was written."""
    from ..report.data import shown_facts  # lazy: heavy
    from .inputs import print_json  # lazy: heavy

    facts = shown_facts(shown.workloads, shown.together, shown.plans, shown.placements)
    written = {"html": options.page, "png": options.png}
    print_json(facts | {key: path and str(path) for key, path in written.items()})


def _print_tables(shown: Shown, options: ShowOptions) -> None:
    """Print a table for each load and plan, and a line for each strategy."""
    from ..report.tables import console, load_table, plan_table  # lazy: heavy

    out, together = console(), shown.together
    limit = None if options.every else 12
    for workload in shown.workloads:
        out.print(load_table(workload, limit))
        out.print()
    for name, plan in shown.placements.items():
        if name in shown.plans:
            layers = plan.num_layers if options.every else 8
            out.print(plan_table(plan, name, together.total, layers))
        else:
            balancedness = plan.overall_balancedness(together.counts)
            out.print(f"{name}: balancedness {balancedness:.4f} on {plan.num_ranks} ranks")
        out.print()
    for written in (options.page, options.png):
        if written is not None:
            out.print(f"{written} written")


def _strategies(
    load: ExpertLoad, plans: dict[str, Placement], options: ShowOptions
) -> dict[str, Placement]:
    """Place by the strategies to show beside the plans, on the same ranks and slots.

    Raises:
        PlacementError: when strategies are named and there is no number of ranks.
    """
    from ..core.topology import Topology  # lazy: heavy
    from ..strategies import PlacementRequest, get_strategy  # lazy: heavy

    names, ranks, redundant = options.strategies, options.ranks, options.redundant
    first = next(iter(plans.values()), None)
    if ranks is None:
        ranks = first.num_ranks if first is not None else None
    if ranks is None:
        if names:
            from ..core.errors import PlacementError  # lazy: heavy

            raise PlacementError(
                f"--strategy {names[0]} without --ranks: strategies place experts on ranks; "
                "add --ranks"
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
