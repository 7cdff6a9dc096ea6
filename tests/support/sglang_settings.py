"""Settings as SGLang's launcher makes them, in one line."""

from __future__ import annotations

from typing import Any

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.common.settings import (
    HostSettings,
    LoadingSettings,
    PlacementSettings,
    RebalancingSettings,
    Settings,
    VerificationSettings,
)


def make_settings(strategy: str, plan: Placement | None = None, **more: Any) -> Settings:
    """Make settings of a server with a placement.

    Args:
        strategy: name of the strategy in force.
        plan: the placement.
        more: "source", "padding" (of the placement), "moves", "plans", "rules", "elastic" (of
            rebalancing), "direct", "reads" (of loading), "verify" (a level), "hosts".
    """
    hosts: HostSettings | None = more.get("hosts")
    return Settings(
        PlacementSettings(strategy, plan, more.get("source", ""), padding=more.get("padding", 0)),
        VerificationSettings(more.get("verify", "off")),
        rebalancing=RebalancingSettings(
            more.get("moves", False),
            more.get("plans", False),
            more.get("rules"),
            more.get("elastic", False),
        ),
        hosts=hosts,
        loading=LoadingSettings(more.get("reads", True), direct=more.get("direct", False)),
        ep_size=1 if plan is None else plan.num_ranks,
    )
