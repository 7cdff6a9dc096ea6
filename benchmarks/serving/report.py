"""What was measured, as tables; ``python -m benchmarks.serving.report FILE...`` prints those of runs' ``--json`` for a page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from .answers import ASKED
from .server_logs import in_words

COLUMNS = ("server", "tokens/s", "over {first}", "of the ideal", "TTFT p50/p99, ms", "TPOT p50/p99, ms", "longest gap, ms", "answers")


def table(workload: str, rounds: Mapping[str, list[dict]], answers: Mapping[str, dict]) -> Table:
    """One workload, a row per server; the first is what the others are compared with.

    Args:
        workload: its name.
        rounds: server -> the figures of each round, as many for each.
        answers: server -> how its answers differ from the first one's.
    """
    made = Table(title=_title(workload, rounds), title_justify="left", box=None)
    for column in _heads(rounds):
        made.add_column(column, justify="left" if column == "server" else "right")
    for cells in _rows(rounds, answers):
        made.add_row(*cells)
    return made


def _title(workload: str, rounds: Mapping[str, list[dict]]) -> str:
    return f"{workload}: medians of {len(next(iter(rounds.values())))} rounds in turns (least to most)"


def _heads(rounds: Mapping[str, list[dict]]) -> list[str]:
    return [column.format(first=next(iter(rounds))) for column in COLUMNS]


def _rows(rounds: Mapping[str, list[dict]], answers: Mapping[str, dict]) -> Iterator[list[str]]:
    """The cells of each server."""
    first = next(iter(rounds))
    speed = {name: np.array([r["tokens_per_s"] for r in rows]) for name, rows in rounds.items()}
    for name, rows in rounds.items():
        middle = {key: float(np.median([r[key] for r in rows])) for key in rows[0]}
        ratio, values, found = speed[name] / speed[first], speed[name], answers.get(name)
        yield [
            name,
            f"{middle['tokens_per_s']:,.0f} ({values.min():,.0f} to {values.max():,.0f})",
            f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
            f"{np.median(speed[name] / speed['ideal']):.3f}" if "ideal" in speed else "",
            f"{middle['ttft_p50']:.1f} / {middle['ttft_p99']:.1f}",
            f"{middle['tpot_p50']:.2f} / {middle['tpot_p99']:.2f}",
            f"{max(r['longest_gap'] for r in rows):.1f}",
            "" if found is None else answers_in_words(found, ASKED),
        ]


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


def markdown(result: Mapping) -> str:
    """All tables of a run's ``--json``, for a page: per batch and workload a row for each server.

    Args:
        result: what `Run` saved; a run that was cut off has fewer rounds, and servers without any are left out.
    """
    facts, parts = result["facts"], []
    parts.append("; ".join(f"{key} {value}" for key, value in facts.items() if key != "command"))
    parts.append(f"`{facts['command']}`")
    balance = result.get("recorded", {}).get("balancedness", {})
    if balance:
        parts.append(f"Balancedness under the load that was planned from: {balance_in_words(balance)}.")
    for batch in result.get("batches", []):
        for workload, rounds in batch["rounds"].items():
            most = max(map(len, rounds.values()), default=0)
            full = {name: rows for name, rows in rounds.items() if rows and len(rows) == most}
            if full and next(iter(rounds)) in full:
                parts.append(_markdown_table(workload, full, batch["answers"]))
        if not batch["rounds"]:
            parts += [f"Answers of {name}: {answers_in_words(found, ASKED)}." for name, found in batch["answers"].items()]
        if "seen" in batch:
            parts.append(f"Balancedness under what was served: {balance_in_words(batch['seen']['balancedness'])}.")
        said = [f"{name}: {words}" for name, found in batch["moved"].items() if (words := in_words(found))]
        if said:
            parts.append(". ".join(said) + ".")
    return "\n\n".join(parts) + "\n"


def balance_in_words(balance: Mapping[str, float]) -> str:
    """Balancedness of each placement."""
    return ", ".join(f"{name} {value:.3f}" for name, value in balance.items())


def _markdown_table(workload: str, rounds: Mapping[str, list[dict]], answers: Mapping[str, dict]) -> str:
    lines = [_heads(rounds), ["---"] * len(COLUMNS), *_rows(rounds, answers)]
    return f"{_title(workload, rounds)}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(markdown(json.loads(Path(file).read_text())))
