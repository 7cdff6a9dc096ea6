"""``moe-placement plan``: from recorded loads to a plan file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


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
            help="Nodes: none; node (the experts of a group on one node); soft (load leaves its node at a price; without groups, experts that "
            "are chosen together share a node: needs recorded co-activation).",
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

    The plan goes to --expert-placement-file of vLLM or SGLang (start the engine with as many ranks and redundant
    experts). Reads what --expert-load-record wrote, and SGLang's .json and .pt.

    Example: moe-placement plan load.safetensors --ranks 32 --redundant 32 -o plan.json
    """
    from ..core.load import ExpertLoad  # lazy: heavy
    from ..core.placement import Placement  # lazy: heavy
    from ..formats.plan_or_load import write  # lazy: heavy
    from ..simulation.cluster import align  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .inputs import check_writable, cluster, print_json, read_loads  # lazy: heavy

    check_writable(output)
    planner = get_strategy(strategy)
    if (
        planner.name == "eplb"
    ):  # not one of another package, whose kernels may need what is left out
        from ..planner.kernels.compiled import without_blas  # lazy: numba

        without_blas()
    workloads = align(read_loads(loads, phase))
    together = ExpertLoad.concatenate([w.load for w in workloads])
    request = cluster(ranks, nodes, redundant, groups, speed, locality).request(together)
    made = planner.place(request)
    metadata = {"loads": [p.name for p in loads], "windows": together.num_windows}
    if "model" in together.metadata:
        metadata["model"] = together.metadata["model"]
    if nodes > 1:
        metadata |= {"node_of_rank": list(request.topology.node_of_rank), "locality": locality}
    made = Placement(
        made.physical_to_logical, made.num_logical_experts, made.slots_per_rank, made.layer_ids, made.strategy,
        {**made.metadata, **metadata},
    )  # fmt: skip
    write(made, output)
    before = get_strategy("linear").place(request)
    if as_json:
        print_json(
            {
                "plan": str(output),
                "strategy": made.strategy,
                "ranks": ranks,
                "redundant": made.num_redundant,
                "layer_ids": list(made.layer_ids),
                "balancedness": made.overall_balancedness(together.counts),
                "linear_balancedness": before.overall_balancedness(together.counts),
                "balancedness_per_layer": made.balancedness(together.total),
                "balancedness_per_workload": {
                    w.name: made.overall_balancedness(w.load.counts) for w in workloads
                },
            }
        )
        return
    from ..report.tables import console, plan_summary  # lazy: heavy

    console().print(plan_summary(made, before, workloads, str(output)))
