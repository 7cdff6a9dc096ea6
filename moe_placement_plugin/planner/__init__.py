"""Decide where experts should lie: the planner behind the `eplb` strategy.

numpy in, numpy out; single-threaded kernels compiled by numba on first use and cached on disk.

- `plan`: a placement for a load, from nothing: one or several windows, flat or with nodes, with
  co-activation.
- `replan`: a better placement than the one in service, with few moves.
- `locality_curve`: balance against load that leaves its home node.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import EFFORTS, MAX_WINDOWS, REPLAN_TOLERANCE

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from .api import locality_curve as locality_curve
    from .api import plan as plan
    from .api import replan as replan
    from .nodes.coactivation import coactivation_of as coactivation_of
    from .nodes.coactivation import crossings_per_token as crossings_per_token
    from .result import LocalityPoint as LocalityPoint
    from .result import Plan as Plan

_EXPORTS = {
    "LocalityPoint": "result",
    "Plan": "result",
    "coactivation_of": "nodes.coactivation",
    "crossings_per_token": "nodes.coactivation",
    "locality_curve": "api",
    "plan": "api",
    "replan": "api",
}
__all__ = ["EFFORTS", "MAX_WINDOWS", "REPLAN_TOLERANCE", *_EXPORTS]


def __getattr__(name: str) -> Any:
    # Lazy, so that who only asks for the options does not load numba.
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
