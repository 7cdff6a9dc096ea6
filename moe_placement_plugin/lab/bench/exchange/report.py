"""Print the tables of ``moe-placement bench exchange``."""

from __future__ import annotations

from rich.console import Console

from ..planner.report import _table, print_machine


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
        moved = row["from_peers"] + row["from_disk"]
        cells = [
            f"{row['replicas']} replicas, {row['dead']} dead",
            row["goal"],
            f"{row['slots']}",
            f"{row['from_peers']} ({row['bytes_moved'] / 1e6:.0f} MB)",
            f"{row['from_disk']} ({row['bytes_read'] / 1e6:.0f} MB)",
        ]
        for kind in ("cold", "cached"):
            f = row[kind]
            cells += [
                f"{f['exchange'] * 1e3:.0f}" if moved else "nothing moves",
                f"{f['reload all'] * 1e3:.0f}",
                f"{f['shorter']:.1f}x" if moved else "",
                f"{f['reload own'] * 1e3:.0f} ({f['shorter than own']:.1f}x)"
                if moved
                else f"{f['reload own'] * 1e3:.0f}",
            ]
        rate = row["bytes_moved"] / row["cached"]["exchange"] / 1e9
        cells.append(
            f"{rate:.2f} ({row['raw'] / row['cached']['exchange']:.0%})"
            if row["goal"] == "all moved"
            else ""
        )
        cells.append(f"{row['staging'] / 1e6:.1f} / {row['chunks']}")
        lines.append(cells)
    disk = rows[0]["disk"]
    way = "read in each other's memory" if rows[0]["sees"] else "sent over gloo"
    title = (
        f"8 processes, experts {way}, {sizes['layers']} layers of {sizes['experts']} experts of "
        f"{sizes['expert_bytes'] / 1e6:.2f} MB; cold: the checkpoint was dropped from the page "
        f"cache before each measurement (at most {max(r['cold']['cached'] for r in rows):.0%} "
        "left)" + (f", the disk reads {disk / 1e9:.2f} GB/s" if disk else "")
    )
    columns = ["case", "goal", "live slots", "from peers", "from disk"]
    for kind in ("cold", "cached"):
        columns += [f"{kind}: exchange ms", "full reload ms", "shorter", "own slots only"]
    _table(console, title, [*columns, "GB/s (of plain copies)", "staging MB / chunks"], lines)


def _drift(rows: list[dict], console: Console) -> None:
    lines = []
    for row in rows:
        for name in ("vLLM default", "replan", "replan, as balanced"):
            if name in row:
                f = row[name]
                label = name + (f" (tolerance {f['tolerance']})" if "tolerance" in f else "")
                fewer = (
                    f"{row['vLLM default']['bytes'] / max(f['bytes'], 1):.1f}x"
                    if "vLLM default" in row and name != "vLLM default"
                    else ""
                )
                lines.append(
                    [
                        row["case"],
                        label,
                        f"{f['moved'] / 20:.0f}",
                        f"{f['bytes'] / 1e9:.1f}",
                        fewer,
                        f"{f['balancedness']:.4f}",
                        f"{f['next']:.4f}",
                    ]
                )
    columns = [
        "case",
        "planner",
        "experts per rebalance",
        "GB in all",
        "fewer",
        "balancedness",
        "next window",
    ]
    _table(console, "20 drifting windows, 32 ranks, 32 redundant experts", columns, lines)
