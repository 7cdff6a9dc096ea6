"""Draw the page's figures as PNG files, with matplotlib (optional extra ``report``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import PlacementError
from ..formats.atomic import write_atomically
from .data import PlacementView, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Write one PNG per figure.

    Returns:
        The files written.

    Raises:
        PlacementError: when matplotlib is not installed or the folder cannot be written.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise PlacementError(
            "--png needs matplotlib: pip install 'moe-placement-plugin[report]'"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlacementError(
            f"{folder} cannot be made ({error.strerror}): give a writable folder"
        ) from None
    written = [_draw_load(report, folder)]
    written += [_draw_ranks(report, view, folder) for view in report.placements]
    if report.placements:
        written += _draw_balancedness(report, folder)
    written += [_draw_pairs(layer, pairs, folder) for layer, pairs in report.coactivation.items()]
    return written


@dataclass(frozen=True)
class _Axes:
    """Hold what a figure and its axes are called.

    Attributes:
        title: of the figure.
        x: name of the horizontal axis.
        y: name of the vertical axis.
    """

    title: str
    x: str
    y: str


def _draw_load(report: Report, folder: Path) -> Path:
    """Draw the load of every expert in every layer."""
    axes = _Axes("Load by layer and expert", "expert", "layer")
    return _heatmap(report.load, axes, report.layer_ids, folder / "load.png")


def _draw_ranks(report: Report, view: PlacementView, folder: Path) -> Path:
    """Draw the load of every rank in every layer under one placement."""
    safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in view.name)
    axes = _Axes(f"Rank load by layer with {view.name}", "rank", "layer")
    return _heatmap(view.rank_load, axes, report.layer_ids, folder / f"rank-load-{safe}.png")


def _draw_balancedness(report: Report, folder: Path) -> list[Path]:
    """Draw the placements' balancedness by layer and, with several windows, over windows."""
    by_layer = {view.name: view.per_layer for view in report.placements}
    axes = _Axes("Balancedness by layer", "layer", "balancedness")
    written = [
        _lines(by_layer, report.layer_ids, axes, folder / "balancedness-by-layer.png"),
    ]
    if len(report.window_names) > 1:
        by_window = {view.name: view.per_window for view in report.placements}
        at = range(1, len(report.window_names) + 1)
        axes = _Axes("Balancedness over windows", "window", "balancedness")
        written.append(_lines(by_window, at, axes, folder / "balancedness-over-windows.png"))
    return written


def _draw_pairs(layer: int, pairs: np.ndarray, folder: Path) -> Path:
    """Draw how often two experts of a layer are chosen together."""
    off = ~np.eye(len(pairs), dtype=bool)
    mean = max(pairs[off].mean(), 1e-12)
    axes = _Axes(f"Experts chosen together in layer {layer}", "expert", "expert")
    rows = range(len(pairs))
    return _heatmap(
        np.where(off, pairs, 0) / mean, axes, rows, folder / f"coactivation-{layer}.png"
    )


def _heatmap(values: np.ndarray, axes: _Axes, rows: Sequence[int], path: Path) -> Path:
    """Draw values as multiples of their mean.

    Args:
        values: ``[rows, columns]``.
        axes: what it is called.
        rows: number of each row, for the ticks.
        path: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5))
    plot = figure.add_subplot()
    image = plot.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=min(8, values.max()),
    )
    plot.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    every = max(1, len(rows) // 12)
    plot.set_yticks(range(0, len(rows), every), [str(i) for i in rows[::every]])
    figure.colorbar(image, label="multiple of the mean")
    return _save(figure, path)


def _lines(values: dict[str, np.ndarray], at: Sequence[int], axes: _Axes, path: Path) -> Path:
    """Draw a line for each name, with marks while there are few points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5))
    plot = figure.add_subplot()
    for name, line in values.items():
        plot.plot(list(at), line, marker="." if len(at) <= 40 else "", label=name)
    plot.set(title=axes.title, xlabel=axes.x, ylabel=axes.y)
    plot.grid(alpha=0.3)
    plot.legend()
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG."""
    content = BytesIO()
    figure.savefig(content, dpi=150, bbox_inches="tight", format="png")
    write_atomically(path, content.getvalue())
    return path
