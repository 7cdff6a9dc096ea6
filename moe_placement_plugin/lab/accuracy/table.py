"""Show the comparison as terminal tables and as plain data."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from .run import STOCK, Verdict


def table(verdict: Verdict) -> Table:
    """Make a row for every configuration, under each task and metric."""
    shown = Table(
        header_style="bold",
        pad_edge=False,
        box=None,
        caption="answers, log probs: questions that differ from stock's",
        caption_justify="left",
    )
    shown.add_column("task and metric", no_wrap=True)
    for name in ("score", "difference", "std. error", "answers", "log probs", "largest"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for task, stock in verdict.runs[STOCK].tasks.items():
        chosen = any(answer.logprobs for answer in stock.answers.values())
        for metric, score in stock.scores.items():
            shown.add_row(f"{task} {metric}")
            shown.add_row(
                f"  {STOCK}",
                f"{score.value:.4f}",
                "",
                _number(score.stderr),
                f"of {len(stock.answers)}",
            )
            for name, tasks in verdict.comparisons.items():
                found = tasks[task]
                compared = found.metrics[metric]
                shown.add_row(
                    f"  {name}",
                    f"{compared.score.value:.4f}",
                    f"{compared.difference:+.4f}",
                    _number(compared.score.stderr),
                    str(found.differing_answers),
                    str(found.differing_logprobs) if chosen else "-",
                    f"{found.largest_logprob_difference:.1e}" if chosen else "-",
                    "equal" if found.passed else "[red]DIFFERENT[/red]",
                )
    return shown


def to_json(verdict: Verdict) -> dict[str, Any]:
    """Return plain data: runs, comparisons and whether all passed."""
    return {
        "passed": verdict.passed,
        "runs": {
            name: {
                "start_seconds": run.start_seconds,
                "examine_seconds": run.examine_seconds,
                "placement": run.placement,
                "scores": {
                    task: {metric: vars(score) for metric, score in result.scores.items()}
                    for task, result in run.tasks.items()
                },
            }
            for name, run in verdict.runs.items()
        },
        "comparisons": {
            name: {task: found.to_json() for task, found in tasks.items()}
            for name, tasks in verdict.comparisons.items()
        },
    }


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
