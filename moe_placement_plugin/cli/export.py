"""Offer ``moe-placement export``: files in other programs' forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A plan or a recorded load.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers",
            help="Layers of the model, dense ones included (default: up to the last MoE layer).",
            min=1,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write a plan or a load in SGLang's own JSON, which --init-expert-location reads.

    A plan becomes physical_to_logical_map, a load logical_count; both number all layers of the
    model, rows of dense layers hold the trivial map or zeros.

    Example: moe-placement export plan.json -o sglang.json --num-layers 61
    """
    import numpy as np

    from ..core.errors import PlacementError  # lazy: heavy
    from ..core.placement import Placement  # lazy: heavy
    from ..formats.atomic import write_atomically  # lazy: heavy
    from ..formats.plan_or_load import read  # lazy: heavy
    from ..formats.sglang import to_sglang  # lazy: heavy
    from .inputs import check_writable, print_json  # lazy: heavy

    check_writable(output)
    found = read(file)
    if isinstance(found, Placement):
        data = to_sglang(found, num_layers)
        key = "physical_to_logical_map"
    else:
        total = max(found.layer_ids) + 1 if num_layers is None else num_layers
        if total <= max(found.layer_ids):
            raise PlacementError(
                f"--num-layers {total}, but the load has layer {max(found.layer_ids)}: give the "
                "model's own"
            )
        rows = np.zeros((total, found.num_experts), dtype=found.total.dtype)
        rows[list(found.layer_ids)] = found.total
        data = {"logical_count": rows.tolist()}
        key = "logical_count"
    write_atomically(output, json.dumps(data).encode())
    summary = {
        "file": str(output),
        "form": key,
        "layers": len(data[key]),
        "columns": len(data[key][0]),
    }
    if as_json:
        print_json(summary)
    else:
        typer.echo(f"{output}: {key} of {summary['layers']} layers x {summary['columns']}")
