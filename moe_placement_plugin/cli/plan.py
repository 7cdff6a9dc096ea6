"""Offer ``moe-placement plan``: from recorded loads to a plan file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..core.load import ExpertLoad
    from ..core.placement import Placement
    from ..simulation.cluster import Workload
    from ..strategies import PlacementRequest

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class PlanOptions:
    """Hold what the command line asks of ``plan``.

    Attributes:
        loads: recorded loads that are planned for together.
        ranks: EP ranks.
        strategy: name of the strategy.
        redundant: redundant experts per layer.
        nodes: nodes that the ranks lie on.
        groups: expert groups of grouped top-k routing.
        locality: what nodes mean.
        speed: relative speed of each rank, as the user wrote it.
        phase: phase of the windows to use, None for all.
    """

    loads: list[Path]
    ranks: int
    strategy: str
    redundant: int
    nodes: int
    groups: int
    locality: str
    speed: str | None
    phase: str | None


@app.command()
def plan(
    loads: Annotated[
        list[Path],
        typer.Argument(help="Recorded loads; several are planned for together.", metavar="LOAD"),
    ],
    ranks: Annotated[int, typer.Option("--ranks", help="Expert parallel ranks.", min=1)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.")],
    strategy: Annotated[str, typer.Option("--strategy", help="Placement strategy.")] = "eplb",
    redundant: Annotated[
        int, typer.Option("--redundant", help="Redundant experts per layer.", min=0)
    ] = 0,
    nodes: Annotated[
        int,
        typer.Option(
            "--nodes", help="Nodes that the ranks lie on, the same number on each.", min=1
        ),
    ] = 1,
    groups: Annotated[
        int, typer.Option("--groups", help="Expert groups of grouped top-k routing.", min=1)
    ] = 1,
    locality: Annotated[
        str,
        typer.Option(
            "--locality",
            help="Nodes: none; node (the experts of a group on one node); soft (load leaves its "
            "node at a price; without groups, experts that are chosen together share a node: "
            "needs recorded co-activation).",
        ),
    ] = "none",
    speed: Annotated[
        str | None, typer.Option("--speed", help="Relative speed of each rank: 1,1,0.5,...")
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option("--phase", help="Use only windows of this phase: prefill, decode or mixed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the prediction as JSON.")] = False,
) -> None:
    """Plan where experts lie, and predict how balanced the ranks will be.

    The plan goes to --expert-placement-file of vLLM or SGLang (start the engine with as many ranks
    and redundant experts). Reads what --expert-load-record wrote, and SGLang's .json and .pt.

    Example: moe-placement plan load.safetensors --ranks 32 --redundant 32 -o plan.json
    """
    from ..formats.plan_or_load import write  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .inputs import check_writable, print_json  # lazy: heavy

    check_writable(output)
    options = PlanOptions(
        loads=loads,
        ranks=ranks,
        strategy=strategy,
        redundant=redundant,
        nodes=nodes,
        groups=groups,
        locality=locality,
        speed=speed,
        phase=phase,
    )
    made, request, workloads, together = _make(options)
    write(made, output)
    before = get_strategy("linear").place(request)
    if as_json:
        from ..report.data import prediction_facts  # lazy: heavy

        predicted = prediction_facts(made, before, workloads, together)
        print_json({"plan": str(output), **predicted})
        return
    from ..report.tables import console, plan_summary  # lazy: heavy

    console().print(plan_summary(made, before, workloads, str(output)))


def _make(
    options: PlanOptions,
) -> tuple[Placement, PlacementRequest, list[Workload], ExpertLoad]:
    """Return the plan, what was asked of the strategy, the loads, and all of them as one."""
    from dataclasses import replace

    from ..core.load import ExpertLoad  # lazy: heavy
    from ..simulation.cluster import align  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .inputs import cluster, read_loads  # lazy: heavy

    planner = get_strategy(options.strategy)
    # Not one of another package, whose kernels may need what is left out.
    if planner.name == "eplb":
        from ..planner.kernels.compiled import without_blas  # lazy: numba

        without_blas()
    workloads = align(read_loads(options.loads, options.phase))
    together = ExpertLoad.concatenate([w.load for w in workloads])
    where = cluster(
        options.ranks,
        options.nodes,
        options.redundant,
        options.groups,
        options.speed,
        options.locality,
    )
    request = where.request(together)
    made = planner.place(request)
    made = replace(made, metadata={**made.metadata, **_provenance(options, together, request)})
    return made, request, workloads, together


def _provenance(
    options: PlanOptions, together: ExpertLoad, request: PlacementRequest
) -> dict[str, Any]:
    """Return what the plan's file says of where it came from."""
    metadata: dict[str, Any] = {
        "loads": [path.name for path in options.loads],
        "windows": together.num_windows,
    }
    if "model" in together.metadata:
        metadata["model"] = together.metadata["model"]
    if options.nodes > 1:
        nodes = list(request.topology.node_of_rank)
        metadata |= {"node_of_rank": nodes, "locality": options.locality}
    return metadata
