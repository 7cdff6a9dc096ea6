"""Settings as vLLM's launcher makes them, in one line."""

from __future__ import annotations

from typing import Any

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.common.settings import (
    LoadingSettings,
    PlacementSettings,
    RebalancingSettings,
    RecordingSettings,
    Settings,
)


def make_settings(
    strategy: str,
    plan: Placement | None,
    ep_size: int,
    record: RecordingSettings | None = None,
    **more: Any,
) -> Settings:
    """Make settings with a placement, or of a server without one (``linear`` and no plan).

    Args:
        strategy: name of the strategy in force.
        plan: the placement.
        ep_size: EP ranks.
        record: what is recorded.
        more: "exact", "redundant" (of the placement), "eplb", "rules" (of rebalancing), "lora".
    """
    eplb = more.get("eplb", False)
    placement = PlacementSettings(
        strategy, plan, exact=more.get("exact", False), redundant=more.get("redundant", 0)
    )
    return Settings(
        None if plan is None and not eplb else placement,
        recording=record,
        rebalancing=RebalancingSettings(eplb, eplb and strategy == "eplb", more.get("rules")),
        loading=LoadingSettings(lora=more.get("lora", False)),
        ep_size=ep_size,
    )
