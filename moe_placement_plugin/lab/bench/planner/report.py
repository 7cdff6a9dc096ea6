"""Print the text tables of ``moe-placement bench planner``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
"""One measurement of a suite."""


def print_machine(result: dict[str, Any], console: Console) -> None:
    """Print what a bench ran on, and what it left out."""
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cpus']} CPUs, load average "
        f"{machine['load_average'][0]:.1f}; {machine['system']}"
    )
    for name, versions in result["versions"].items():
        console.print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for name, reason in result["missing"].items():
        console.print(f"  {name}: left out, {reason}")


def print_report(result: dict[str, Any], console: Console) -> None:
    """Print every suite that ``result`` holds."""
    print_machine(result, console)
    for suite, show in (
        ("traces", _traces),
        ("synthetic", _synthetic),
        ("moves", _moves),
        ("workloads", _workloads),
        ("locality", _locality),
        ("coactivation", _coactivation),
    ):
        if result.get(suite):
            show(result[suite], console)


def _table(
    console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]
) -> None:
    """Print one table, the first column to the left."""
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _planners(rows: list[Row]) -> list[str]:
    """Return the names of all planners, in the order of the rows."""
    return list(dict.fromkeys(name for row in rows for name in row["planners"]))


def _mean(rows: list[Row], planner: str, key: str) -> float:
    """Return the mean of one figure of a planner over rows; NaN where none has it."""
    values = [
        row["planners"][planner][key] for row in rows if key in row["planners"].get(planner, {})
    ]
    return float(np.mean(values)) if values else float("nan")


def _traces(rows: list[Row], console: Console) -> None:
    """Print the balancedness on every trace, one table for each cluster."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape]
        lines = []
        for planner in _planners(here):
            found = [
                row["planners"][planner] for row in here if "ms" in row["planners"].get(planner, {})
            ]
            if not found:
                reason = next(row["planners"][planner].get("error", "") for row in here)
                lines.append([planner, reason[:60]])
                continue
            ms, cpu = (float(np.median([f[k] for f in found])) for k in ("ms", "cpu_ms"))
            lines.append(
                [planner]
                + [f"{f['balancedness']:.4f}" for f in found]
                + [
                    f"{np.mean([f['next'] for f in found]):.4f}",
                    f"{min(f['worst_layer'] for f in found):.4f}",
                    f"{ms:.2f}",
                    f"{cpu:.2f}",
                ]
            )
        lines.append(["bound", *(f"{row['bound']:.4f}" for row in here)])
        names = [row["case"].replace("deepseek_r1_", "") for row in here]
        _table(
            console,
            f"Traces, {shape}: balancedness",
            ["planner", *names, "next", "worst layer", "ms", "CPU ms"],
            lines,
        )
        _ratios(here, console)


def _ratios(rows: list[Row], console: Console) -> None:
    """Print the times of the engines' planners over this package's, case by case in one run."""
    for own in ("fast", "best"):
        parts = []
        for other in ("vLLM default", "SGLang deepseek_vec"):
            ratios = [
                row["planners"][other]["ms"] / row["planners"][own]["ms"]
                for row in rows
                if all("ms" in row["planners"].get(p, {}) for p in (own, other))
            ]
            if ratios:
                cpu = [
                    row["planners"][other]["cpu_ms"] / row["planners"][own]["cpu_ms"]
                    for row in rows
                    if "cpu_ms" in row["planners"].get(other, {})
                ]
                parts.append(
                    f"{np.median(ratios):.1f}x faster than {other} "
                    f"(lowest {min(ratios):.1f}x; by CPU time {np.median(cpu):.1f}x)"
                )
        if parts:
            console.print(f"  {own}: " + ", ".join(parts))


def _synthetic(rows: list[Row], console: Console) -> None:
    """Print the means over synthetic loads, by redundancy and by family."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        skewed = row["family"] == "zipf 1.2" and "17-25%" in row["kind"]
        groups.setdefault(row["kind"] + (", zipf 1.2" if skewed else ""), []).append(row)
    for key in ("balancedness", "next", "of the bound"):
        lines = []
        for planner in [*_planners(rows), *(["bound"] if key == "balancedness" else [])]:
            line = [planner]
            for here in groups.values():
                if planner == "bound":
                    line.append(f"{np.mean([row['bound'] for row in here]):.4f}")
                elif key == "of the bound":
                    values = [
                        row["planners"][planner]["balancedness"] / row["bound"]
                        for row in here
                        if "ms" in row["planners"].get(planner, {})
                    ]
                    line.append(f"{np.mean(values):.5f}" if values else "-")
                else:
                    line.append(f"{_mean(here, planner, key):.4f}")
            lines.append(line)
        _table(
            console,
            f"Synthetic loads: {key}, mean over shapes and families",
            ["planner", *groups],
            lines,
        )
    families = dict.fromkeys(row["family"] for row in rows)
    lines = []
    for planner in _planners(rows):
        lines.append(
            [
                planner,
                *(
                    f"{_mean([r for r in rows if r['family'] == f], planner, 'balancedness'):.4f}"
                    for f in families
                ),
            ]
        )
    _table(
        console,
        "Synthetic loads: balancedness by family, all shapes",
        ["planner", *families],
        lines,
    )


def _moves(rows: list[Row], console: Console) -> None:
    """Print the slots that move from window to window, and between pairs of traces."""
    drifting = [row for row in rows if "fresh" not in row]
    pairs = [row for row in rows if "fresh" in row]
    lines = [
        [
            row["case"],
            planner,
            f"{row[planner]['moved']:.0f}",
            f"{row[planner]['moved'] / row['slots']:.1%}",
            f"{row[planner]['planned']:.4f}",
            f"{row[planner]['next']:.4f}",
            f"{row[planner]['ms']:.1f}",
            f"{row[planner]['cpu_ms']:.1f}",
        ]
        for row in drifting
        for planner in ("vLLM default", "replan")
        if planner in row
    ]
    _table(
        console,
        "Moves per rebalance",
        ["case", "planner", "slots moved", "share", "planned", "next", "ms", "CPU ms"],
        lines,
    )
    for row in drifting:
        if "vLLM default" in row:
            v, r = row["vLLM default"], row["replan"]
            fewer = v["moved"] / max(r["moved"], 1)
            gain = r["planned"] - v["planned"]
            console.print(f"  {row['case']}: {fewer:.1f}x fewer moves, balance {gain:+.4f}")
    if pairs:
        _pairs(pairs, console)


def _pairs(pairs: list[Row], console: Console) -> None:
    """Print what a rebalance between two traces moves and loses."""
    found = [row["replan"] for row in pairs]
    shares = [row["replan"]["moved"] / row["slots"] for row in pairs]
    cpu = [f["cpu_ms"] for f in found]
    loss = max(row["fresh"] - row["replan"]["planned"] for row in pairs)
    console.print(
        f"  {len(pairs)} pairs of traces: replan moves {np.mean(shares):.1%} of the slots "
        f"(most {max(shares):.1%}), planned {min(f['planned'] for f in found):.4f} at least, "
        f"{np.median([f['ms'] for f in found]):.1f} ms ({np.median(cpu):.1f} ms of CPU, "
        f"most {max(cpu):.1f}); below its own fresh plan by at most {loss:.4f}"
    )
    with_vllm = [row for row in pairs if "vLLM default" in row]
    if with_vllm:
        vllm = [row["vLLM default"] for row in with_vllm]
        ratios = [row["vLLM default"]["moved"] / row["replan"]["moved"] for row in with_vllm]
        loss = max(row["vLLM default"]["planned"] - row["replan"]["planned"] for row in with_vllm)
        share = np.mean([v["moved"] / row["slots"] for v, row in zip(vllm, with_vllm)])
        console.print(
            f"  vLLM moves {share:.1%}: {np.mean(ratios):.1f}x as many "
            f"(lowest {min(ratios):.1f}x); balance below vLLM's by at most {loss:.4f}"
        )


def _workloads(rows: list[Row], console: Console) -> None:
    """Print the worst balancedness of plans for several workloads."""
    ways = [key for key in rows[0] if key not in ("trained", "seconds")]
    lines = []
    for label, pick in (("median", np.median), ("lowest", np.min), ("highest", np.max)):
        for way in ways:
            trained = pick([row[way]["trained"] for row in rows])
            others = [row[way]["others"] for row in rows if row[way]["others"] is not None]
            lines.append(
                [
                    f"{label} of {len(rows)}",
                    way,
                    f"{trained:.4f}",
                    f"{pick(others):.4f}" if others else "-",
                ]
            )
    _table(
        console,
        "Several workloads at once: worst balancedness",
        ["choices of four", "planner", "of the four", "of the others"],
        lines,
    )
    seconds = [row["seconds"] for row in rows]
    console.print(f"  time: median {np.median(seconds):.2f} s, slowest {max(seconds):.2f} s")
    for way in ways[1:]:
        gains = sorted(
            ((row["together"]["others"] or 0) - (row[way]["others"] or 0), row["trained"])
            for row in rows
        )
        enough = sum(gain >= 0.10 for gain, _ in gains)
        console.print(
            f"  worst of the others against {way}: median {np.median([g for g, _ in gains]):+.4f}, "
            f"{enough} of {len(gains)} choices gain at least 10 points; "
            f"most {gains[-1][0]:+.4f} ({', '.join(gains[-1][1])})"
        )


def _locality(rows: list[Row], console: Console) -> None:
    """Print hierarchical plans against their bound, and the curves of the soft form."""
    lines = [
        [
            row["case"],
            str(row["slots"]),
            f"{row['hierarchical']:.4f}",
            f"{row['bound']:.4f}",
            f"{row['hierarchical'] / row['bound']:.5f}",
            f"{row['at_most_15%'][1]:.4f} at {row['at_most_15%'][0]:.1%}",
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]
    _table(
        console,
        "Nodes: 8 groups on 4",
        [
            "trace",
            "slots",
            "hierarchical",
            "bound",
            "of the bound",
            "soft, at most 15% leaving",
            "s",
        ],
        lines,
    )
    for row in rows:
        points = ", ".join(f"{leaving:.1%}: {balance:.3f}" for leaving, balance in row["curve"])
        console.print(f"  {row['case']}, {row['slots']} slots, leaving: balancedness: {points}")


def _coactivation(rows: list[Row], console: Console) -> None:
    """Print crossings per token."""
    lines = [
        [
            f"{row['case']}, {row['nodes']} nodes",
            row["plan"],
            f"{row['crossings']:.3f}",
            f"{row['ranks_per_token']:.3f}",
            f"{row['planned']:.4f}",
            f"{row['next']:.4f}",
        ]
        for row in rows
    ]
    _table(
        console,
        "Co-activation, counted on the other half of the tokens",
        ["trace", "plan", "node crossings per token", "ranks per token", "planned", "next"],
        lines,
    )
