"""Text tables of ``moe-placement bench exchange``."""

from __future__ import annotations

from rich.console import Console

from .planner_report import _table, print_machine


def print_report(result: dict, console: Console) -> None:
    """Print every suite that ``result`` holds."""
    print_machine(result, console)
    if result.get("dead"):
        _dead(result["dead"], result["sizes"], console)
    if result.get("drift"):
        _drift(result["drift"], console)


def _dead(rows: list[dict], sizes: dict, console: Console) -> None:
    lines = []
    for row in rows:
        rate = row["bytes_moved"] / row["seconds"] / 1e9
        moved = row["from_peers"] + row["from_disk"]
        lines.append(
            [
                f"{row['replicas']} replicas, {row['dead']} dead",
                row["goal"],
                f"{row['slots']}",
                f"{row['from_peers']} ({row['bytes_moved'] / 1e6:.0f} MB)",
                f"{row['from_disk']} ({row['bytes_read'] / 1e6:.0f} MB)",
                f"{row['seconds'] * 1e3:.0f}" if moved else "nothing moves",
                f"{row['longest'] * 1e3:.0f}" if moved else "",
                f"{row['reload'] * 1e3:.0f}",
                f"{row['ratio']:.1f}x" if moved else "",
                f"{_uncached(row, sizes['expert_bytes']):.1f}x" if moved and row["disk"] else "",
                f"{rate:.2f} ({row['raw'] / row['seconds']:.0%})" if row["goal"] == "all moved" else "",
                f"{row['staging'] / 1e6:.1f}",
            ]
        )
    title = (
        f"8 processes over gloo, {sizes['layers']} layers of {sizes['experts']} experts of {sizes['expert_bytes'] / 1e6:.2f} MB, one layer a chunk; "
        f"checkpoint {rows[0]['cache']}" + (f", the disk reads {rows[0]['disk'] / 1e9:.2f} GB/s past the cache" if rows[0]["disk"] else "")
    )
    columns = [
        "case", "goal", "live slots", "from peers", "from disk", "exchange ms", "longest chunk", "full reload ms", "shorter",
        "uncached", "GB/s (of plain copies)", "staging MB",
    ]  # fmt: skip
    _table(console, title, columns, lines)


def _uncached(row: dict, expert_bytes: int) -> float:
    """How many times shorter the exchange would be if what both read came from the disk, at its measured rate; computed, not measured."""
    cold = row["slots"] * expert_bytes / row["disk"]
    return (row["reload"] + cold) / (row["seconds"] + row["bytes_read"] / row["disk"])


def _drift(rows: list[dict], console: Console) -> None:
    lines = []
    for row in rows:
        for name in ("vLLM default", "replan", "replan, as balanced"):
            if name in row:
                f = row[name]
                label = name + (f" (tolerance {f['tolerance']})" if "tolerance" in f else "")
                fewer = f"{row['vLLM default']['bytes'] / max(f['bytes'], 1):.1f}x" if "vLLM default" in row and name != "vLLM default" else ""
                lines.append(
                    [row["case"], label, f"{f['moved'] / 20:.0f}", f"{f['bytes'] / 1e9:.1f}", fewer, f"{f['balancedness']:.4f}", f"{f['next']:.4f}"]
                )
    columns = ["case", "planner", "experts per rebalance", "GB in all", "fewer", "balancedness", "next window"]
    _table(console, "20 drifting windows, 32 ranks, 32 redundant experts", columns, lines)
