"""Lay out terminal tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..core.diff import Moves
from ..core.load import ExpertLoad
from ..core.placement import Placement
from ..simulation.cluster import Workload
from ..simulation.simulate import Simulation

_BARS = " ▁▂▃▄▅▆▇█"


def console() -> Console:
    """Return a console on stdout; a pipe gets plain text wide enough not to break tables."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=120)


def sparkline(values: np.ndarray, width: int = 40) -> str:
    """Draw values as bars from zero to their greatest.

    More values than ``width`` are shown by the greatest of each stretch.
    """
    values = np.asarray(values, dtype=float)
    if values.size > width:
        values = np.array([part.max() for part in np.array_split(values, width)])
    most = values.max() if values.size else 0
    if most <= 0:
        return _BARS[0] * values.size
    return "".join(_BARS[int(np.ceil(v / most * (len(_BARS) - 1)))] for v in values)


def count(number: float) -> str:
    """Write a count in few characters: 12.3k, 4.56M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"


def worst_layers(balancedness: np.ndarray, limit: int) -> np.ndarray:
    """Return the rows of the least balanced layers, worst first."""
    return np.argsort(balancedness, kind="stable")[:limit]


def _table(columns: Sequence[str], left: int = 1) -> Table:
    table = Table(header_style="bold", pad_edge=False, box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return table


def _heading(text: str) -> Text:
    return Text(text, style="italic")


def plan_summary(
    made: Placement, before: Placement, workloads: Sequence[Workload], path: str
) -> Group:
    """Lay out what ``plan`` prints: the prediction per workload, and the worst layers.

    The engine's default stands beside it.
    """
    together = ExpertLoad.concatenate([w.load for w in workloads])
    table = _table(["workload", "windows", "linear", made.strategy])
    for workload in workloads:
        counts = workload.load.counts
        table.add_row(
            workload.name,
            str(workload.load.num_windows),
            f"{before.overall_balancedness(counts):.4f}",
            f"{made.overall_balancedness(counts):.4f}",
        )
    if len(workloads) > 1:
        table.add_row(
            "all", str(together.num_windows), f"{before.overall_balancedness(together.counts):.4f}",
            f"{made.overall_balancedness(together.counts):.4f}", style="bold",
        )  # fmt: skip
    per_layer, layer_before = made.balancedness(together.total), before.balancedness(together.total)
    worst = _table(["layer", "linear", made.strategy])
    for row in worst_layers(per_layer, 5):
        worst.add_row(str(made.layer_ids[row]), f"{layer_before[row]:.4f}", f"{per_layer[row]:.4f}")
    return Group(
        _heading("Predicted balancedness (mean rank load / greatest, 1 is perfect)"), table, Text(),
        _heading("Worst layers"), worst, Text(),
        Text(f"{describe(made)} written to {path}"),
    )  # fmt: skip


FACTS = ("model", "engine", "started", "hosts")
"""What a report says of a recording, where the recording knows."""


def _nodes(plan: Placement) -> str:
    nodes = plan.metadata.get("node_of_rank")
    return (
        f" on {len(set(nodes))} nodes"
        if isinstance(nodes, list) and len(nodes) == plan.num_ranks
        else ""
    )


def describe(plan: Placement) -> str:
    """Describe a plan in one line."""
    slots = (
        str(plan.slots_per_rank[0])
        if plan.is_even
        else f"{min(plan.slots_per_rank)} to {max(plan.slots_per_rank)}"
    )
    return (
        f"Plan {plan.digest[:12]} ({plan.strategy}): {plan.num_layers} layers x "
        f"{plan.num_logical_experts} experts on {plan.num_ranks} "
        f"ranks{_nodes(plan)}, {slots} slots each, {plan.num_redundant} redundant"
    )


def load_table(workload: Workload, limit: int | None = 12) -> Group:
    """Lay out a load: each layer's skew and hottest experts.

    The most skewed ``limit`` layers are shown, all when None.
    """
    load = workload.load
    total = load.total
    mean = np.maximum(total.mean(axis=1), 1e-12)
    skew = total.max(axis=1) / mean
    rows = (
        np.argsort(-skew, kind="stable")[:limit]
        if limit is not None and load.num_layers > limit
        else np.arange(load.num_layers)
    )
    phases = ", ".join(f"{load.phases.count(p)} {p}" for p in dict.fromkeys(load.phases))
    of = (
        f" (the {len(rows)} most skewed of {load.num_layers})"
        if len(rows) < load.num_layers
        else ""
    )
    table = _table(
        ["layer", "by expert", "tokens", "max/mean", "never used", "hottest experts"], left=2
    )
    for row in rows:
        hottest = np.argsort(-total[row], kind="stable")[:3]
        table.add_row(
            str(load.layer_ids[row]),
            sparkline(total[row]),
            count(float(total[row].sum())),
            f"{skew[row]:.2f}",
            str(int((total[row] == 0).sum())),
            "  ".join(f"{e} ({total[row, e] / mean[row]:.1f}x)" for e in hottest),
        )
    facts = "  ".join(f"{key} {load.metadata[key]}" for key in FACTS if load.metadata.get(key))
    head = (
        f"{workload.name}: {load.num_layers} layers x {load.num_experts} experts, windows: {phases}"
    )
    return Group(
        Text(head, style="bold"),
        *([Text(facts)] if facts else []),
        Text(),
        _heading(f"Load by layer{of}"),
        table,
    )


def plan_table(
    plan: Placement, name: str, counts: np.ndarray | None = None, limit: int = 12
) -> Group:
    """Lay out a plan, and with ``counts [layers, experts]`` the rank loads in the worst layers."""
    parts: list[Any] = [Text(f"{name}: {describe(plan)}")]
    copies = np.bincount(plan.replica_counts.ravel())
    if plan.num_redundant:
        parts.append(
            Text(
                "Copies of an expert: "
                + ", ".join(f"{n} x {copies[n]}" for n in range(1, len(copies)) if copies[n])
            )
        )
    if counts is not None:
        balance, ranks = plan.balancedness(counts), plan.rank_load(counts)
        table = _table(["layer", "by rank", "balancedness", "max/mean", "busiest rank"], left=2)
        for row in worst_layers(balance, limit):
            table.add_row(
                str(plan.layer_ids[row]),
                sparkline(ranks[row]),
                f"{balance[row]:.4f}",
                f"{1 / balance[row]:.2f}",
                str(int(ranks[row].argmax())),
            )
        parts += [
            Text(f"Balancedness overall {plan.overall_balancedness(counts):.4f}"),
            Text(),
            _heading("Rank load by layer, worst first"),
            table,
        ]
    return Group(*parts)


def simulation_table(found: Simulation) -> Group:
    """Lay out outcomes side by side, the matrix of workloads, and the verdict."""
    timed = found.cost is not None
    columns = ["strategy", "balancedness", "max/mean", "worst layer", "worst window", "next window"]
    table = _table(columns + (["MoE ms/step", "ideal"] if timed else []))
    for outcome in found.outcomes:
        row = [
            outcome.name,
            f"{outcome.overall:.4f}",
            f"{outcome.max_over_mean:.2f}",
            f"{outcome.per_layer.min():.4f}",
            f"{outcome.per_window.min():.4f}",
            "-" if outcome.next_window is None else f"{outcome.next_window:.4f}",
        ]
        if outcome.step is not None:
            row += [
                f"{outcome.step.total_us / 1000:.3f}",
                f"{outcome.step.ideal_us.sum() / 1000:.3f}",
            ]
        table.add_row(*row, style="bold" if outcome is found.best else "")
    parts: list[Any] = [_heading("On the recorded load"), table]
    names = [w.name for w in found.workloads]
    for outcome in found.outcomes:
        if outcome.served is None:
            continue
        fixed = bool(np.allclose(outcome.served, outcome.served[0]))
        title = f"{outcome.name}: " + (
            "the same whatever it is planned on"
            if fixed
            else "planned on the row, serving the column"
        )
        matrix = _table(["", *(str(i + 1) for i in range(len(names)))])
        for i, name in enumerate(names[:1] if fixed else names):
            matrix.add_row(
                "any" if fixed else f"{i + 1} {name}", *(f"{v:.3f}" for v in outcome.served[i])
            )
        if not fixed:
            counts = [w.load.counts for w in found.workloads]
            matrix.add_row(
                "all together",
                *(f"{outcome.placement.overall_balancedness(c):.3f}" for c in counts),
                style="bold",
            )
        parts += [Text(), _heading(title), matrix]
    if len(names) > 1:
        parts += [
            Text(),
            Text("Workloads: " + ", ".join(f"{i + 1} {name}" for i, name in enumerate(names))),
        ]
    return Group(*parts, Text(), *(Text(sentence) for sentence in found.verdict()))


def moves_table(moves: Moves, expert_bytes: int | None, bandwidth: float) -> Group:
    """Lay out what ``diff`` prints."""
    per_layer = moves.received.sum(axis=1)
    lines = [
        f"{moves.total} of {moves.slots * len(moves.layer_ids)} slots receive an expert from "
        f"another rank ({moves.share:.1%}), in "
        f"{int((per_layer > 0).sum())} of {len(moves.layer_ids)} layers; copies change for "
        f"{int(moves.replicas_changed.sum())} experts.",
    ]
    if expert_bytes is not None:
        lines.append(
            f"{count(moves.bytes(expert_bytes))}B cross between ranks, at least "
            f"{moves.seconds(expert_bytes, bandwidth):.3g} s at "
            f"{bandwidth / 1e9:g} GB/s per rank."
        )
    else:
        lines.append("Bytes and time need --expert-bytes or --model.")
    if not moves.total:
        return Group(Text("No expert crosses between ranks."))
    table = _table(["layer", "moves by rank", "moves", "slots changed"], left=2)
    for row in np.argsort(-per_layer, kind="stable")[:8]:
        if per_layer[row]:
            table.add_row(
                str(moves.layer_ids[row]),
                sparkline(moves.received[row]),
                str(int(per_layer[row])),
                str(int(moves.changed_slots[row])),
            )
    return Group(*(Text(line) for line in lines), Text(), _heading("Most moves"), table)
