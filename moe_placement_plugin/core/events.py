"""Count what has happened to the placement in this process: a rebalance, bytes moved, a check."""

from __future__ import annotations

_counts: dict[str, float] = {}


def count_event(event: str, amount: float = 1) -> None:
    """Count something that has happened.

    The numbers go into the recording's metadata, and from there to ``/metrics`` (see
    `recording.metrics`).

    Args:
        event: its name there.
        amount: how often, or how much of it.
    """
    _counts[event] = _counts.get(event, 0) + amount


def event_counts() -> dict[str, float]:
    """Return event -> amount of everything that was counted so far."""
    return dict(_counts)
