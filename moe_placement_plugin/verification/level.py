"""Say how far weights are verified: the value of ``--expert-placement-verify``."""

from __future__ import annotations

from ..core.errors import PlacementError

LEVELS = ("off", "replicas", "checkpoint")
"""How far: off, nothing; replicas, all replicas of an expert hold the same bits and every expert is
somewhere; checkpoint, every slot also holds what the engine's own loader makes of its expert in a
clean load."""


def check_level(value: str | None, placed: bool) -> str:
    """Return the level in force.

    Args:
        value: what the user asked for, None for the default.
        placed: whether a placement is in force.

    Raises:
        PlacementError: for an unknown level.
    """
    if value is None:
        return "replicas" if placed else "off"
    if value not in LEVELS:
        raise PlacementError(
            f"--expert-placement-verify {value}: expected one of {', '.join(LEVELS)}"
        )
    return value
