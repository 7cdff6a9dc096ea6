"""Offer ``moe-placement bench``: measurements on this machine, one file per verb.

What measures lies in `moe_placement_plugin.lab.bench`.
"""

from __future__ import annotations

import typer

from . import exchange, layer, planner, verify

app = typer.Typer(
    help="Measure planners and layers on this machine.", add_completion=False, no_args_is_help=True
)


@app.callback()
def bench() -> None:
    """Measure planners and layers on this machine."""


app.command("planner", help=planner.HELP)(planner.bench_planner)
app.command("layer", help=layer.HELP)(layer.bench_layer)
app.command("exchange", help=exchange.HELP)(exchange.bench_exchange)
app.command("verify", help=verify.HELP)(verify.bench_verify)
