"""Offer ``moe-placement demo``: a tiny model served by a real engine on this machine's CPU."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core.errors import PlacementError

if TYPE_CHECKING:
    from ..lab.demo.run import Demonstration

app = typer.Typer(add_completion=False)

HELP = (
    "Serve a tiny MoE model stock on one rank and placed on two, and show that the answers are "
    "equal.\n\n"
    "Everything runs on this machine's CPU. Exit code 1 when an answer differs."
)


@app.command(help=HELP)
def demo(
    engine: Annotated[
        str, typer.Option(help="vllm or sglang; default: the one that is installed.")
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="qwen3-moe (30 experts, no groups), glm4-moe (32 experts in 4 groups) or all."
        ),
    ] = "all",
    strategy: Annotated[str, typer.Option(help="Strategy of the placed server.")] = "zigzag",
    keep: Annotated[
        Path | None, typer.Option(help="Keep checkpoints, logs and recorded loads in this folder.")
    ] = None,
) -> None:
    """Serve a tiny MoE model stock on one rank and placed on two, and compare the answers."""
    from ..engines.common.installed import require_engine  # lazy: heavy
    from ..lab.demo.run import run  # lazy: heavy
    from ..lab.demo.tiny_models import MODELS  # lazy: heavy
    from ..lab.servers.engines import SERVING_ENGINES  # lazy: heavy
    from ..strategies import get_strategy  # lazy: heavy
    from .progress import Progress  # lazy: heavy

    console = Console()
    name = require_engine(engine or None)
    if name not in SERVING_ENGINES:
        raise PlacementError(
            f"no demonstration for engine {name!r}: choose one of {', '.join(SERVING_ENGINES)}"
        )
    if model != "all" and model not in MODELS:
        raise PlacementError(
            f"unknown model {model!r}: choose one of {', '.join((*MODELS, 'all'))}"
        )
    if get_strategy(strategy).needs_load:
        raise PlacementError(
            f"strategy {strategy} needs a recorded load, which the demonstration has only "
            "afterwards: choose another one"
        )
    folder = Path(tempfile.mkdtemp(prefix="moe-placement-demo-")) if keep is None else keep
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    equal = True
    try:
        for chosen in MODELS if model == "all" else (model,):
            console.print(f"Making a tiny {chosen} checkpoint in {folder / chosen}")
            checkpoint = MODELS[chosen](folder / chosen)
            with Progress(console) as progress:
                outcome = run(SERVING_ENGINES[name], chosen, checkpoint, strategy, folder, progress)
            _show(console, outcome)
            equal &= outcome.equal
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    console.print(f"Done in {time.monotonic() - began:.0f} s; nothing is left running.")
    if not equal:
        raise typer.Exit(1)


def _show(console: Console, outcome: Demonstration) -> None:
    placement = outcome.placement
    table = Table(
        title=f"{outcome.model}: experts of layer {placement.layer_ids[0]} by {outcome.strategy}"
    )
    table.add_column("EP rank", justify="right")
    table.add_column("experts")
    for rank in range(placement.num_ranks):
        table.add_row(str(rank), " ".join(str(e) for e in placement.local_experts(0, rank)))
    console.print(table)
    if outcome.placed_log:
        console.print(f"The engine says: {outcome.placed_log}", markup=False, highlight=False)

    total = int(outcome.load.counts.sum())
    table = Table(
        title=f"{outcome.model}: balancedness on the load just seen ({total} expert choices, "
        f"{outcome.load.num_layers} MoE layers)"
    )
    table.add_column("strategy")
    table.add_column("mean rank load / greatest", justify="right")
    for name, value in outcome.balancedness.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    tokens = sum(len(a.token_ids) for a in outcome.placed)
    if outcome.equal:
        console.print(
            f"[green]equal[/green]: {tokens} greedy tokens of {len(outcome.placed)} prompts are "
            "those of the stock engine on one rank; "
            f"log probabilities differ by at most {outcome.largest_logprob_difference:.1e}"
        )
    else:
        console.print(
            f"[red]DIFFERENT[/red]: stock {outcome.stock}\nplaced {outcome.placed}", highlight=False
        )
