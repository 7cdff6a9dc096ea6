"""Find the MoE kernel's tuned configuration where ranks hold redundant experts.

See `engines.common.kernel_configs`.
"""

from __future__ import annotations

from ..common.kernel_configs import ConfigsOfFewer
from .hook_registry import Hook
from .state import plan_here


def redundant_per_rank() -> int:
    """Return the redundant experts that each rank holds in a layer, 0 without a placement."""
    plan = plan_here()
    return 0 if plan is None else plan.num_redundant // plan.num_ranks


def tuned_hooks() -> list[Hook]:
    """Return the hook of a server with redundant experts."""
    return [
        Hook(
            name="tuned-with-redundant-experts",
            target="sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config:"
            "get_moe_configs",
            hook=ConfigsOfFewer(redundant_per_rank),
            relies_on=("E", "N"),
            why="the kernel's tuned configuration is looked up by experts per rank, and no file "
            "has the number with redundant ones: slow",
            removable_when="the look-up takes the nearest number of experts",
            optional=True,
        ),
    ]
