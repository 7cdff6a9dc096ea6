"""Render one self-contained HTML page; nothing is fetched.

Figures are drawn by the page's own script from data inside it.
"""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from typing import Any

import numpy as np

from .data import Report


def render(report: Report) -> str:
    """Render the page as text.

    Values of heatmaps travel as 16-bit steps of a scale, which is finer than a screen can show.
    """
    folder = resources.files(__package__)
    data = json.dumps(_data(report), separators=(",", ":")).replace("<", "\\u003c")
    page = (folder / "page.html").read_text()
    for mark, text in (
        ("/*STYLE*/", (folder / "page.css").read_text()),
        ("/*SCRIPT*/", (folder / "page.js").read_text()),
        ("<!--TITLE-->", html.escape(report.title)),
        ("<!--SUMMARY-->", _summary(report)),
        ("<!--WORST-->", _worst(report)),
        ("{/*DATA*/}", data),
    ):
        page = page.replace(mark, text)
    return page


def _data(report: Report) -> dict[str, Any]:
    return {
        "layers": list(report.layer_ids),
        "windows": list(report.window_names),
        "load": _packed(report.load),
        "placements": [
            {
                "name": view.name,
                "ranks": _packed(view.rank_load),
                "perLayer": np.round(view.per_layer, 4).tolist(),
                "perWindow": np.round(view.per_window, 4).tolist(),
            }
            for view in report.placements
        ],
        "pairs": [
            {"layer": layer, "values": _packed(_relative(pairs))}
            for layer, pairs in report.coactivation.items()
        ],
    }


def _relative(pairs: np.ndarray) -> np.ndarray:
    """Return co-activation as a multiple of the mean pair; the diagonal is unused."""
    off = ~np.eye(len(pairs), dtype=bool)
    values = np.where(off, pairs, 0).astype(float)
    return values / max(values[off].mean() if off.any() else 0.0, 1e-12)


def _packed(values: np.ndarray) -> dict[str, Any]:
    most = float(values.max()) or 1.0
    steps = np.round(values / most * 65535).astype("<u2")
    rows, columns = values.shape
    return {
        "rows": rows,
        "columns": columns,
        "most": most,
        "data": base64.b64encode(steps.tobytes()).decode(),
    }


def _summary(report: Report) -> str:
    facts = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in report.facts
    )
    cards = "".join(
        f'<article class="card"><h3>{html.escape(view.name)}</h3><p '
        f'class="figure">{view.overall:.3f}</p>'
        f"<p>balancedness; the busiest rank has {1 / view.overall:.2f}x the mean</p>"
        f'<p class="quiet">{html.escape(view.description)}</p></article>'
        for view in report.placements
    )
    return f'<dl class="facts">{facts}</dl><div class="cards">{cards}</div>'


def _worst(report: Report) -> str:
    if not report.placements:
        return ""
    first = report.placements[0]
    order = np.argsort(first.per_layer, kind="stable")[:10]
    head = "".join(f"<th>{html.escape(view.name)}</th>" for view in report.placements)
    rows = "".join(
        f"<tr><th>{report.layer_ids[row]}</th>"
        + "".join(f"<td>{view.per_layer[row]:.3f}</td>" for view in report.placements)
        + f"<td>{int(report.load[row].argmax())} ({report.load[row].max():.1f}x)</td></tr>"
        for row in order
    )
    return (
        '<section><h2>Least balanced layers</h2><p class="hint">By balancedness with '
        f'{html.escape(first.name)}.</p><div class="scroll">'
        f"<table><thead><tr><th>layer</th>{head}<th>hottest "
        f"expert</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )
