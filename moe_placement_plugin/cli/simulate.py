"""Offer ``moe-placement simulate``: strategies side by side, before anything is deployed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..core.placement import Placement
    from ..simulation.costmodel import Calibration
    from ..simulation.simulate import Simulation
    from ..strategies import Strategy

HELP = (
    "Compare strategies on recorded loads: on the load itself, on the window after it, and across "
    "workloads.\n\n"
    "Says plainly when balance buys nothing. With a calibration it also predicts the time of the "
    "MoE layers, and states\n"
    "the calibration's error on measurements that it was not fitted to.\n\n"
    "Example: moe-placement simulate a.safetensors b.safetensors --ranks 32 --redundant 32"
)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class SimulateOptions:
    """Hold what the command line asks of ``simulate``.

    Attributes:
        loads: recorded loads, one per workload.
        ranks: EP ranks.
        strategies: names; the others are compared with the first.
        plans: plan files to compare too.
        redundant: redundant experts per layer.
        nodes: nodes that the ranks lie on.
        groups: expert groups of grouped top-k routing.
        speed: relative speed of each rank, as the user wrote it.
        phase: phase of the windows to use, None for all.
        calibration: file or name of a calibration, None for no times.
        tokens: tokens of a step over all ranks, for times.
        top_k: experts per token, for times; None for as recorded.
        all_gather: whether every rank gets all tokens, for times.
    """

    loads: list[Path]
    ranks: int
    strategies: list[str]
    plans: list[Path]
    redundant: int
    nodes: int
    groups: int
    speed: str | None
    phase: str | None
    calibration: str | None
    tokens: int
    top_k: int | None
    all_gather: bool


@app.command(help=HELP)
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
            help="Cost model of your device: a file, or the name of a shipped one. "
            "Without it no times.",
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
    """Compare strategies, and print them side by side."""
    options = SimulateOptions(
        loads=loads,
        ranks=ranks,
        strategies=strategy or ["linear", "zigzag", "eplb"],
        plans=plans or [],
        redundant=redundant,
        nodes=nodes,
        groups=groups,
        speed=speed,
        phase=phase,
        calibration=calibration,
        tokens=tokens,
        top_k=top_k,
        all_gather=all_gather,
    )
    found, measured = _simulate(options)
    if as_json:
        from ..report.data import simulation_facts  # lazy: heavy
        from .inputs import print_json  # lazy: heavy

        print_json(simulation_facts(found, measured))
        return
    from ..report.tables import console, simulation_table  # lazy: heavy

    out = console()
    if found.cost is not None and measured is not None:
        out.print(f"Times: {measured.summary}; {found.cost.accuracy}")
    out.print(simulation_table(found))


def _simulate(options: SimulateOptions) -> tuple[Simulation, Calibration | None]:
    """Return the simulation, and the calibration that its times are predicted by."""
    from ..simulation.costmodel import find_calibration, fit  # lazy: heavy
    from ..simulation.simulate import simulate as run  # lazy: heavy
    from .inputs import cluster, read_loads  # lazy: heavy

    where = cluster(options.ranks, options.nodes, options.redundant, options.groups, options.speed)
    workloads = read_loads(options.loads, options.phase)
    candidates = _candidates(options)
    measured = None if options.calibration is None else find_calibration(options.calibration)
    cost = None if measured is None else fit(measured.measurements)
    top_k = options.top_k
    if top_k is None:
        recorded = (w.load.metadata["top_k"] for w in workloads if w.load.metadata.get("top_k"))
        top_k = next(recorded, 8)
    found = run(workloads, candidates, where, cost, options.tokens, top_k, options.all_gather)
    return found, measured


def _candidates(options: SimulateOptions) -> dict[str, Strategy | Placement]:
    """Return what is compared: strategies by name, plans by their files' names.

    Raises:
        PlacementError: when a plan is for another number of ranks.
    """
    from ..core.errors import PlacementError  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .inputs import read_plan  # lazy: heavy

    ranks = options.ranks
    candidates: dict[str, Strategy | Placement] = {
        name: get_strategy(name) for name in options.strategies
    }
    for path in options.plans:
        plan = read_plan(path, ranks)
        if plan.num_ranks != ranks:
            raise PlacementError(
                f"{path} is a plan for {plan.num_ranks} EP ranks, --ranks is {ranks}: "
                f"plan for {ranks} ranks"
            )
        candidates[path.name] = plan
    return candidates
