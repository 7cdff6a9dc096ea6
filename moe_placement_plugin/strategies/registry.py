"""Find strategies by name, this package's own and those of others."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from ..core.errors import PlacementError
from .base import Strategy

ENTRY_POINT_GROUP = "moe_placement_plugin.strategies"

# Names only: an engine's argument parser needs them in processes that never place anything.
_BUILT_IN = {
    "linear": "linear:Linear",
    "balanced": "balanced:Balanced",
    "zigzag": "zigzag:Zigzag",
    "eplb": "eplb:Eplb",
}

ALIASES = {"round_robin": "zigzag"}
"""Other names of built-in strategies: vLLM calls zigzag round_robin."""


@lru_cache(maxsize=1)
def _third_party() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _BUILT_IN or point.name in ALIASES or point.name in found:
            raise PlacementError(
                f"strategy {point.name!r} of {point.value} takes a name that is in use: rename "
                "its entry point"
            )
        found[point.name] = point
    return found


def strategy_names() -> tuple[str, ...]:
    """List every accepted name, built-in ones first, aliases left out."""
    return (*_BUILT_IN, *_third_party())


def get_strategy(name: str) -> Strategy:
    """Make the strategy called ``name``.

    Raises:
        PlacementError: when there is none, or a third party's cannot be loaded.
    """
    name = ALIASES.get(name, name)
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        return getattr(import_module(f".{module}", __package__), attribute)()
    point = _third_party().get(name)
    if point is None:
        raise PlacementError(
            f"unknown expert placement strategy {name!r}: choose one of "
            f"{', '.join((*strategy_names(), *ALIASES))}"
        )
    try:
        loaded = point.load()
    except Exception as error:
        raise PlacementError(
            f"strategy {name!r} ({point.value}) failed to import: {error}; mend or remove that "
            "package"
        ) from error
    strategy = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(strategy, Strategy):
        raise PlacementError(
            f"strategy {name!r} ({point.value}) is no Strategy: derive it from "
            "moe_placement_plugin.strategies.Strategy"
        )
    return strategy
