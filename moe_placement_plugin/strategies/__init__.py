"""Hold the placement strategies: one file each, one registry, more by entry point.

A third party adds a strategy with the entry point group ``moe_placement_plugin.strategies``, whose
objects are `Strategy` instances (or classes without constructor arguments).
"""

from .base import PlacementRequest, Strategy
from .registry import ALIASES, ENTRY_POINT_GROUP, get_strategy, strategy_names

__all__ = [
    "ALIASES",
    "ENTRY_POINT_GROUP",
    "PlacementRequest",
    "Strategy",
    "get_strategy",
    "strategy_names",
]
