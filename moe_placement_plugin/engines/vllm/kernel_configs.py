"""The MoE kernel's tuned configuration where EPLB has redundant experts; see `engines.common.kernel_configs`."""

from __future__ import annotations

from ..common.kernel_configs import ConfigsOfFewer
from ..common.patching import Patch
from .state import STATE


def _redundant_per_rank() -> int:
    settings = STATE.settings
    if settings is None or settings.placement is None:
        return 0
    return settings.placement.redundant // settings.ep_size


def _get_moe_configs(original):
    look_up = ConfigsOfFewer(_redundant_per_rank)

    def get_moe_configs(*args, **kwargs):
        return look_up(original, *args, **kwargs)

    return get_moe_configs


def tuned_patches() -> list[Patch]:
    """The patch of a server with redundant experts."""
    return [
        Patch(
            "tuned-with-redundant-experts",
            "vllm.model_executor.layers.fused_moe.fused_moe:get_moe_configs",
            _get_moe_configs,
            relies_on=("E", "N"),
            why="the kernel's tuned configuration is looked up by experts per rank, and no file has the number with redundant ones: slow",
            removable_when="the look-up takes the nearest number of experts",
            optional=True,
        )
    ]
