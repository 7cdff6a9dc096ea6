"""What was measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.table import Table

COLUMNS = ("server", "tokens/s", "over {first}", "of the ideal", "TTFT p50/p99, ms", "TPOT p50/p99, ms", "longest gap, ms", "answers")


def table(workload: str, rounds: Mapping[str, list[dict]], answers: Mapping[str, dict], asked: int) -> Table:
    """One workload, a row per server; the first is what the others are compared with.

    Args:
        workload: its name.
        rounds: server -> the figures of each round, as many for each.
        answers: server -> how its answers differ from the first one's.
        asked: answers that were compared.
    """
    first = next(iter(rounds))
    made = Table(title=f"{workload}: medians of {len(rounds[first])} rounds in turns (least to most)", title_justify="left", box=None)
    for column in COLUMNS:
        made.add_column(column.format(first=first), justify="left" if column == "server" else "right")
    speed = {name: np.array([r["tokens_per_s"] for r in rows]) for name, rows in rounds.items()}
    for name, rows in rounds.items():
        middle = {key: float(np.median([r[key] for r in rows])) for key in rows[0]}
        ratio, values = speed[name] / speed[first], speed[name]
        ideal = f"{np.median(speed[name] / speed['ideal']):.3f}" if "ideal" in speed else ""
        found = answers.get(name)
        made.add_row(
            name,
            f"{middle['tokens_per_s']:.0f} ({values.min():.0f} to {values.max():.0f})",
            f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
            ideal,
            f"{middle['ttft_p50']:.1f} / {middle['ttft_p99']:.1f}",
            f"{middle['tpot_p50']:.2f} / {middle['tpot_p99']:.2f}",
            f"{max(r['longest_gap'] for r in rows):.1f}",
            "" if found is None else answers_in_words(found, asked),
        )
    return made


def answers_in_words(found: dict, asked: int) -> str:
    """How a server's answers differ from the first one's, of `difference`."""
    if not found["different"]:
        return f"equal, logprobs {found['logprobs']:.1e}"
    return f"{found['different']} of {asked} differ where {found['behind']:.2f} behind, logprobs {found['logprobs']:.1e}"


def prediction_in_words(predicted: dict) -> str:
    """One line of what the cost model predicted."""
    if not predicted["servers"]:
        return "cost model: no prediction, the first server's MoE layers and the ideal ones take the same time, or one of the two is missing"
    each = (f"{name} {p['predicted']:.0f} tokens/s ({p['error']:+.1%})" for name, p in predicted["servers"].items())
    return f"cost model, steps of {predicted['step_tokens']} tokens, between the first server and the ideal one: " + ", ".join(each)
