"""Offer ``moe-placement diff``: what it takes to get from one plan to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

HELP = (
    "Compare two plans: experts that cross between ranks, bytes, and the least time at a "
    "bandwidth.\n\n"
    "Example: moe-placement diff old.json new.json --model /models/DeepSeek-R1 --bandwidth 50"
)


@app.command(help=HELP)
def diff(
    old: Annotated[
        Path, typer.Argument(help="Plan in force, or 'linear' for the engine's default.")
    ],
    new: Annotated[Path, typer.Argument(help="Plan to go to.")],
    expert_bytes: Annotated[
        int | None, typer.Option("--expert-bytes", help="Bytes of one expert's weights.", min=1)
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="Model directory or config.json, to take the bytes of an expert from."
        ),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", help="What a rank can receive, in GB/s (10^9 bytes).")
    ] = 50.0,
    ranks: Annotated[
        int | None, typer.Option("--ranks", help="EP ranks, for plans in SGLang's form.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two plans."""
    from ..core import diff as moves  # lazy: heavy
    from ..core.errors import PlacementError  # lazy: heavy
    from ..core.topology import Topology  # lazy: heavy
    from ..formats.model_config import expert_bytes_from  # lazy: heavy
    from ..strategies import PlacementRequest, get_strategy  # lazy: heavy
    from .inputs import read_plan  # lazy: heavy

    if bandwidth <= 0:
        raise PlacementError(f"--bandwidth {bandwidth}: give GB/s greater than 0")
    after = read_plan(new, ranks)
    if str(old) == "linear":
        request = PlacementRequest(
            after.num_layers,
            after.num_logical_experts,
            Topology(after.num_ranks),
            after.num_redundant,
            after.slots_per_rank,
            after.layer_ids,
        )
        before = get_strategy("linear").place(request)
    else:
        before = read_plan(old, ranks)
    found = moves.compare(before, after)
    if model is not None and expert_bytes is None:
        expert_bytes = expert_bytes_from(model)
    if as_json:
        typer.echo(moves.as_json(found, expert_bytes, bandwidth * 1e9))
        return
    from ..report.tables import console, moves_table  # lazy: heavy

    console().print(moves_table(found, expert_bytes, bandwidth * 1e9))
