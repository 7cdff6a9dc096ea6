"""The page's figures as PNG files, with matplotlib (optional extra ``report``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.errors import PlacementError
from .data import Report


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Write one PNG per figure.

    Returns:
        The files written.

    Raises:
        PlacementError: when matplotlib is not installed or the folder cannot be written.
    """
    try:
        from matplotlib.figure import Figure
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
    written: list[Path] = []

    def save(figure: Figure, name: str) -> None:
        from io import BytesIO

        from ..formats.atomic import write_atomically  # lazy: heavy

        content = BytesIO()
        figure.savefig(content, dpi=150, bbox_inches="tight", format="png")
        path = folder / f"{name}.png"
        write_atomically(path, content.getvalue())
        written.append(path)

    def heatmap(
        values: np.ndarray, title: str, x: str, y: str, rows: tuple[int, ...], name: str
    ) -> None:
        figure = Figure(figsize=(10, 5))
        axes = figure.add_subplot()
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=0,
            vmax=min(8, values.max()),
        )
        axes.set(title=title, xlabel=x, ylabel=y)
        every = max(1, len(rows) // 12)
        axes.set_yticks(range(0, len(rows), every), [str(i) for i in rows[::every]])
        figure.colorbar(image, label="multiple of the mean")
        save(figure, name)

    def lines(key: str, x: str, at: list[int], title: str, name: str) -> None:
        figure = Figure(figsize=(10, 3.5))
        axes = figure.add_subplot()
        for view in report.placements:
            axes.plot(at, getattr(view, key), marker="." if len(at) <= 40 else "", label=view.name)
        axes.set(title=title, xlabel=x, ylabel="balancedness")
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, name)

    heatmap(report.load, "Load by layer and expert", "expert", "layer", report.layer_ids, "load")
    for view in report.placements:
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in view.name)
        heatmap(
            view.rank_load,
            f"Rank load by layer with {view.name}",
            "rank",
            "layer",
            report.layer_ids,
            f"rank-load-{safe}",
        )
    if report.placements:
        lines(
            "per_layer",
            "layer",
            list(report.layer_ids),
            "Balancedness by layer",
            "balancedness-by-layer",
        )
        if len(report.window_names) > 1:
            at = list(range(1, len(report.window_names) + 1))
            lines(
                "per_window", "window", at, "Balancedness over windows", "balancedness-over-windows"
            )
    for layer, pairs in report.coactivation.items():
        off = ~np.eye(len(pairs), dtype=bool)
        mean = max(pairs[off].mean(), 1e-12)
        title = f"Experts chosen together in layer {layer}"
        heatmap(
            np.where(off, pairs, 0) / mean,
            title,
            "expert",
            "expert",
            tuple(range(len(pairs))),
            f"coactivation-{layer}",
        )
    return written
