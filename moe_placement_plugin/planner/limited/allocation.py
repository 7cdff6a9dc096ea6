"""Share a budget of moves out over layers, where it lowers the busiest ranks most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """Say what a layer comes to by its first steps.

    Attributes:
        moves: slots that have to be fetched.
        time: of the busiest rank, in one unit for all layers.
        ladder: which descent of the layer the steps are of.
        steps: how many.
    """

    moves: int
    time: float
    ladder: int
    steps: int


def _lower_hull(points: Sequence[Point]) -> list[int]:
    """Return the points from the first on that no mix of two others beats, by growing moves."""
    hull = [0]
    for k in sorted(range(1, len(points)), key=lambda k: (points[k].moves, points[k].time)):
        if points[k].time >= points[hull[-1]].time:
            continue
        if points[k].moves <= points[hull[-1]].moves:
            hull[-1] = k
            continue
        while len(hull) > 1:
            a, b = points[hull[-2]], points[hull[-1]]
            if (a.time - b.time) * (points[k].moves - b.moves) > (b.time - points[k].time) * (
                b.moves - a.moves
            ):
                break
            hull.pop()
        hull.append(k)
    return hull


def allocate(curves: Sequence[Sequence[Point]], budget: int) -> list[int]:
    """Choose one point of every layer's curve for the lowest total time within a budget of moves.

    Greedy along the lower convex hulls, steepest segment first.

    Args:
        curves: the points of each layer, the old placement with 0 moves first.
        budget: moves of all layers together.

    Returns:
        The chosen index into each curve.
    """
    segments = []
    for layer, points in enumerate(curves):
        for a, b in pairwise(_lower_hull(points)):
            cost = points[b].moves - points[a].moves
            gain = (points[a].time - points[b].time) / max(cost, 1e-9)
            segments.append((gain, layer, b, cost))
    segments.sort(key=lambda s: (-s[0], s[1]))
    chosen = [0] * len(curves)
    blocked = set()
    for _, layer, point, cost in segments:
        if layer in blocked:
            continue
        if cost > budget:
            blocked.add(layer)
            continue
        budget -= cost
        chosen[layer] = point
    return chosen
