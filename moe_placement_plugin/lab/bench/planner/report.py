"""Text tables of ``moe-placement bench planner``."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table


def print_machine(result: dict, console: Console) -> None:
    """Print what a bench ran on, and what it left out."""
    machine = result["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cpus']} CPUs, load average {machine['load_average'][0]:.1f}; {machine['system']}"
    )
    for name, versions in result["versions"].items():
        console.print(f"  {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for name, reason in result["missing"].items():
        console.print(f"  {name}: left out, {reason}")


def print_report(result: dict, console: Console) -> None:
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
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _planners(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["planners"]))


def _mean(rows: list[dict], planner: str, key: str) -> float:
    values = [
        row["planners"][planner][key] for row in rows if key in row["planners"].get(planner, {})
    ]
    return float(np.mean(values)) if values else float("nan")


def _traces(rows: list[dict], console: Console) -> None:
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


def _ratios(rows: list[dict], console: Console) -> None:
    """Times of the engines' planners over this package's, case by case in the same run."""
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
                    f"{np.median(ratios):.1f}x faster than {other} (lowest {min(ratios):.1f}x; by CPU time {np.median(cpu):.1f}x)"
                )
        if parts:
            console.print(f"  {own}: " + ", ".join(parts))


def _synthetic(rows: list[dict], console: Console) -> None:
    groups: dict[str, list[dict]] = {}
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


def _moves(rows: list[dict], console: Console) -> None:
    drifting = [row for row in rows if "fresh" not in row]
    pairs = [row for row in rows if "fresh" in row]
    lines = []
    for row in drifting:
        for planner in ("vLLM default", "replan"):
            if planner in row:
                f = row[planner]
                lines.append(
                    [
                        row["case"],
                        planner,
                        f"{f['moved']:.0f}",
                        f"{f['moved'] / row['slots']:.1%}",
                        f"{f['planned']:.4f}",
                        f"{f['next']:.4f}",
                        f"{f['ms']:.1f}",
                        f"{f['cpu_ms']:.1f}",
                    ]
                )
    _table(
        console,
        "Moves per rebalance",
        ["case", "planner", "slots moved", "share", "planned", "next", "ms", "CPU ms"],
        lines,
    )
    for row in drifting:
        if "vLLM default" in row:
            v, r = row["vLLM default"], row["replan"]
            console.print(
                f"  {row['case']}: {v['moved'] / max(r['moved'], 1):.1f}x fewer moves, balance {r['planned'] - v['planned']:+.4f}"
            )
    if pairs:
        shares = [row["replan"]["moved"] / row["slots"] for row in pairs]
        text = f"  {len(pairs)} pairs of traces: replan moves {np.mean(shares):.1%} of the slots (most {max(shares):.1%}), planned "
        text += f"{min(row['replan']['planned'] for row in pairs):.4f} at least, {np.median([row['replan']['ms'] for row in pairs]):.1f} ms"
        cpu = [row["replan"]["cpu_ms"] for row in pairs]
        text += f" ({np.median(cpu):.1f} ms of CPU, most {max(cpu):.1f}); below its own fresh plan by at most "
        text += f"{max(row['fresh'] - row['replan']['planned'] for row in pairs):.4f}"
        console.print(text)
        with_vllm = [row for row in pairs if "vLLM default" in row]
        if with_vllm:
            ratios = [row["vLLM default"]["moved"] / row["replan"]["moved"] for row in with_vllm]
            loss = max(
                row["vLLM default"]["planned"] - row["replan"]["planned"] for row in with_vllm
            )
            share = np.mean([row["vLLM default"]["moved"] / row["slots"] for row in with_vllm])
            console.print(
                f"  vLLM moves {share:.1%}: {np.mean(ratios):.1f}x as many (lowest {min(ratios):.1f}x); balance below vLLM's by at most {loss:.4f}"
            )


def _workloads(rows: list[dict], console: Console) -> None:
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
    console.print(
        f"  time: median {np.median([row['seconds'] for row in rows]):.2f} s, slowest {max(row['seconds'] for row in rows):.2f} s"
    )
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


def _locality(rows: list[dict], console: Console) -> None:
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


def _coactivation(rows: list[dict], console: Console) -> None:
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
