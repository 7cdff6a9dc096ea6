"""Read what a model's config.json says about its experts."""

from __future__ import annotations

from pathlib import Path

from ..core.diff import expert_bytes_of
from ..core.errors import PlacementError
from .atomic import read_json


def expert_bytes_from(path: str | Path) -> int:
    """Read the bytes of one expert from a model directory or its ``config.json``.

    `expert_bytes_of` says what counts.

    Raises:
        PlacementError: when there is none, or it does not say.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    config = read_json(path, "model config")
    if not isinstance(config, dict):
        raise PlacementError(
            f"{path} is no model config: give a model directory or its config.json"
        )
    return expert_bytes_of(config, str(path))
