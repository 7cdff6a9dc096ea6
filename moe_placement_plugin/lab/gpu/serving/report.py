"""Show what was measured as tables.

``python -m moe_placement_plugin.lab.gpu.serving.report FILE...`` prints those of runs' ``--json``
for a page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from rich.table import Table

from .answers import ASKED
from .server_logs import in_words

SHOWN = 16
"""Kernels in a table."""
COLUMNS = (
    "server",
    "tokens/s",
    "over {first}",
    "of the ideal",
    "TTFT p50/p99, ms",
    "TPOT p50/p99, ms",
    "by the engine",
    "longest gap, ms",
    "answers",
)


def table(workload: str, rounds: Mapping[str, list[dict]], answers: Mapping[str, dict]) -> Table:
    """Make one workload's table, a row per server; the others are compared with the first.

    Args:
        workload: its name.
        rounds: server -> the figures of each round, as many for each.
        answers: server -> how its answers differ from the first one's.
    """
    return _table(_title(workload, rounds), _lines(rounds, answers))


def kernel_table(load: str, found: Mapping[str, Mapping]) -> Table:
    """Make a table of what a MoE layer takes under one load, a column per server.

    Args:
        load: of `kernels.LOADS`.
        found: server -> what `kernels.per_layer` returned; the first is what the others are
            compared with.
    """
    return _table(_kernel_title(load), _kernel_lines(found))


def _table(title: str, lines: Iterable[list[str]]) -> Table:
    """Make a table; the first line is of heads, the first column of names."""
    heads, *rows = lines
    made = Table(title=title, title_justify="left", box=None)
    for number, column in enumerate(heads):
        made.add_column(column, justify="right" if number else "left")
    for cells in rows:
        made.add_row(*cells)
    return made


def _kernel_title(load: str) -> str:
    return f"kernels in {load}: microseconds (launches) per MoE layer, where servers differ most"


def _kernel_lines(found: Mapping[str, Mapping]) -> Iterator[list[str]]:
    """Yield heads, the kernels in which servers differ most, and what a layer takes."""
    yield ["kernel", *found]
    kernels = [of["kernels"] for of in found.values()]
    gap = {
        n: max(abs(k.get(n, [0.0])[0] - kernels[0].get(n, [0.0])[0]) for k in kernels)
        for one in kernels
        for n in one
    }
    for name in sorted(gap, key=lambda n: (-gap[n], n))[:SHOWN]:
        yield [name, *(f"{k[name][0]:.1f} ({k[name][1]:g})" if name in k else "" for k in kernels)]
    yield [
        "all kernels",
        *(
            f"{sum(t for t, _ in k.values()):.1f} ({sum(n for _, n in k.values()):g})"
            for k in kernels
        ),
    ]
    yield ["from layer to layer", *(f"{of['span']:.1f}" for of in found.values())]
    if all("ranks" in of for of in found.values()):
        yield [
            "each rank, without collectives",
            *(f"{min(of['ranks']):.1f} to {max(of['ranks']):.1f}" for of in found.values()),
        ]
    yield ["the busiest rank's MoE kernels", *(f"{of['moe']:.1f}" for of in found.values())]
    yield ["the same, all layers, ms", *(f"{of['moe_total'] / 1e3:.2f}" for of in found.values())]
    if all("experts_total" in of for of in found.values()):
        yield [
            "with sort, activation, sum, ms",
            *(f"{of['experts_total'] / 1e3:.2f}" for of in found.values()),
        ]


def by_load(kernels: Mapping[str, Mapping[str, Mapping]]) -> dict[str, dict[str, Mapping]]:
    """Turn what was profiled, server -> load, into load -> server."""
    loads = dict.fromkeys(load for of in kernels.values() for load in of)
    return {load: {name: of[load] for name, of in kernels.items() if load in of} for load in loads}


def disturbed_in_words(rounds: Mapping[str, list[dict]]) -> str:
    """Describe what the machine did to the measuring, most of all rounds.

    What is as long as a wait of a server's is none of that server's.
    """
    all_rounds = [row for rows in rounds.values() for row in rows if "client_lag" in row]
    if not all_rounds:
        return ""
    lag, stolen = (max(row[key] for row in all_rounds) for key in ("client_lag", "stolen"))
    return (
        f"the client itself was held up for at most {lag:.0f} ms, and other machines took at most "
        f"{stolen:.1%} of the processors' time in a round"
    )


def _title(workload: str, rounds: Mapping[str, list[dict]]) -> str:
    return (
        f"{workload}: medians of {len(next(iter(rounds.values())))} rounds in turns (least to most)"
    )


def _lines(rounds: Mapping[str, list[dict]], answers: Mapping[str, dict]) -> Iterator[list[str]]:
    """Yield heads, and the cells of each server."""
    first = next(iter(rounds))
    yield [column.format(first=first) for column in COLUMNS]
    speed = {name: np.array([r["tokens_per_s"] for r in rows]) for name, rows in rounds.items()}
    for name, rows in rounds.items():
        middle = {
            key: float(np.median([r[key] for r in rows])) for key in rows[0] if key != "engine_tpot"
        }
        own = [r["engine_tpot"] for r in rows if r.get("engine_tpot") is not None]
        ratio, values, found = speed[name] / speed[first], speed[name], answers.get(name)
        yield [
            name,
            f"{middle['tokens_per_s']:,.0f} ({values.min():,.0f} to {values.max():,.0f})",
            f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})",
            f"{np.median(speed[name] / speed['ideal']):.3f}" if "ideal" in speed else "",
            f"{middle['ttft_p50']:.1f} / {middle['ttft_p99']:.1f}",
            f"{middle['tpot_p50']:.2f} / {middle['tpot_p99']:.2f}",
            f"{np.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own else "",
            f"{max(r['longest_gap'] for r in rows):.1f}",
            "" if found is None else answers_in_words(found, ASKED),
        ]


def answers_in_words(found: dict, asked: int) -> str:
    """Describe how a server's answers differ from the first one's, as `difference` found."""
    same = (
        "equal"
        if not found["different"]
        else f"{found['different']} of {asked} differ where {found['behind']:.2f} behind"
    )
    half = (
        f", half of them {found['median']:.1e}" if "median" in found else ""
    )  # earlier files are without it
    return f"{same}, logprobs {found['logprobs']:.1e}{half}"


def prediction_in_words(predicted: dict) -> str:
    """Describe in one line what the cost model predicted."""
    if not predicted["servers"]:
        return (
            "cost model: no prediction, the first server's MoE layers and the ideal ones take the "
            "same time, or one of the two is missing"
        )
    each = (
        f"{name} {p['predicted']:.0f} tokens/s ({p['error']:+.1%})"
        for name, p in predicted["servers"].items()
    )
    return (
        f"cost model, steps of {predicted['step_tokens']} tokens, between the first server and the "
        "ideal one: " + ", ".join(each)
    )


def layers_in_words(load: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """Describe in one line what `predict_layers` found under one load."""
    if not found:
        return (
            f"cost model, MoE layers in {load}: no prediction, no such kernel of the first "
            "server's was seen"
        )
    first, *others = found.items()
    text = (
        f"cost model, MoE layers in {load}: {first[0]} {first[1]['predicted']:.0f} us predicted, "
        f"{first[1]['measured']:.0f} measured"
    )
    for name, of in others:
        times = [of[key] / first[1][key] for key in ("predicted", "measured")]
        text += (
            f"; {name} {times[0]:.3f} times that predicted, {times[1]:.3f} measured "
            f"({of['error']:+.1%})"
        )
    return text


def markdown(result: Mapping) -> str:
    """Return all tables of a run's ``--json`` for a page: a row for each server.

    There is one per batch and workload.

    Args:
        result: what `Run` saved; a run that was cut off has fewer rounds, and servers without any
            are left out.
    """
    facts, parts = result["facts"], []
    parts.append("; ".join(f"{key} {value}" for key, value in facts.items() if key != "command"))
    parts.append(f"`{facts['command']}`")
    balance = result.get("recorded", {}).get("balancedness", {})
    if balance:
        parts.append(
            f"Balancedness under the load that was planned from: {balance_in_words(balance)}."
        )
    for batch in result.get("batches", []):
        for workload, rounds in batch["rounds"].items():
            most = max(map(len, rounds.values()), default=0)
            full = {name: rows for name, rows in rounds.items() if rows and len(rows) == most}
            if full and next(iter(rounds)) in full:
                parts.append(
                    _markdown_table(_title(workload, full), _lines(full, batch["answers"]))
                )
                if words := disturbed_in_words(full):
                    parts.append(_sentence(words))
                if predicted := batch.get("predicted", {}).get(workload):
                    parts.append(_sentence(prediction_in_words(predicted)))
        for load, found in by_load(batch.get("kernels", {})).items():
            parts.append(_markdown_table(_kernel_title(load), _kernel_lines(found)))
            if predicted := batch.get("layers", {}).get(load):
                parts.append(_sentence(layers_in_words(load, predicted)))
        if not batch["rounds"]:
            parts += [
                f"Answers of {name}: {answers_in_words(found, ASKED)}."
                for name, found in batch["answers"].items()
            ]
        if "seen" in batch:
            parts.append(
                "Balancedness under what was served: "
                f"{balance_in_words(batch['seen']['balancedness'])}."
            )
        said = [
            f"{name}: {words}"
            for name, found in batch["moved"].items()
            if (words := in_words(found))
        ]
        if said:
            parts.append(". ".join(said) + ".")
    return "\n\n".join(parts) + "\n"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def balance_in_words(balance: Mapping[str, float]) -> str:
    """Describe the balancedness of each placement."""
    return ", ".join(f"{name} {value:.3f}" for name, value in balance.items())


def _markdown_table(title: str, lines: Iterable[list[str]]) -> str:
    """Return a table as Markdown; the first line is of heads."""
    heads, *rows = lines
    return f"{title}\n\n" + "\n".join(
        f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows]
    )


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(markdown(json.loads(Path(file).read_text())))
