"""Place the experts of Mixture-of-Experts models that vLLM and SGLang serve.

The core (placement, load, topology, strategies) is plain numpy and imports neither torch nor an
engine; ``engines`` connects it to the engine that is installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers
    from .core.errors import PlacementError as PlacementError
    from .core.load import ExpertLoad as ExpertLoad
    from .core.placement import Placement as Placement
    from .core.topology import Topology as Topology
    from .formats.plan_or_load import read as read
    from .formats.plan_or_load import write as write
    from .strategies import PlacementRequest as PlacementRequest
    from .strategies import get_strategy as get_strategy
    from .strategies import strategy_names as strategy_names

_EXPORTS = {
    "ExpertLoad": "core.load",
    "Placement": "core.placement",
    "PlacementError": "core.errors",
    "PlacementRequest": "strategies",
    "Topology": "core.topology",
    "get_strategy": "strategies",
    "read": "formats.plan_or_load",
    "strategy_names": "strategies",
    "write": "formats.plan_or_load",
}
__all__ = ["__version__", "enable", *_EXPORTS]


def enable() -> None:
    """Let engines that are built in this process take the placement arguments.

    Command lines and the first engine of a process need no such call. A program that builds an
    engine without a placement first and one with a placement later does: engines load plugins once
    per process, and a plugin that was asked for nothing then has left the engine untouched.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is not None:
        from .engines.vllm import enable as enable_vllm  # lazy: heavy

        enable_vllm()


def __getattr__(name: str) -> Any:
    # Lazy, so that an engine process that loads the plugin without its flag pays nothing for numpy.
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
