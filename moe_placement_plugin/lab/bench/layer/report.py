"""Print the text tables of ``moe-placement bench layer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from ....simulation.costmodel import LayerCost
from .run import LayerTimes


def print_report(
    outcomes: Sequence[LayerTimes],
    fits: Mapping[str, LayerCost | str],
    facts: Mapping[str, Any],
    console: Console,
) -> None:
    """Print strategies side by side for each batch and rank number, then the fitted cost model."""
    console.print("; ".join(f"{k} {v}" for k, v in facts.items()), highlight=False)
    for (ranks, phase, tokens), group in groupby(
        outcomes, key=lambda o: (o.ranks, o.phase, o.tokens_per_rank)
    ):
        rows = list(group)
        table = Table(
            title=f"EP {ranks}, {phase}, {tokens} tokens per rank, {len(rows[0].layers)} layers",
            title_justify="left",
            box=None,
        )
        for column in ("strategy", "us per layer", f"{rows[0].strategy} / it", "balancedness"):
            table.add_column(column, justify="left" if column == "strategy" else "right")
        for row in rows:
            table.add_row(
                row.strategy,
                f"{row.microseconds / len(row.layers):.1f}",
                f"{rows[0].microseconds / row.microseconds:.3f}",
                f"{row.balancedness:.3f}",
            )
        console.print(table)
    for phase, cost in fits.items():
        if isinstance(cost, str):
            console.print(f"Cost model, {phase}: none ({cost})", highlight=False)
            continue
        console.print(f"Cost model, {phase}: {cost.formula}; {cost.accuracy}", highlight=False)


def as_json(outcomes: Sequence[LayerTimes]) -> list[dict[str, Any]]:
    """Return every figure of every rank."""
    return [
        {
            "strategy": o.strategy,
            "ranks": o.ranks,
            "phase": o.phase,
            "tokens_per_rank": o.tokens_per_rank,
            "microseconds": o.microseconds,
            "balancedness": o.balancedness,
            "layers": {str(layer): [vars(r) for r in times] for layer, times in o.layers.items()},
        }
        for o in outcomes
    ]
