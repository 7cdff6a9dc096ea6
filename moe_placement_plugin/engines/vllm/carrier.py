"""How settings reach every process of vLLM, and bring the patches into force there: by being unpickled.

They travel inside ``VllmConfig.additional_config``. A process without this package cannot read the config and dies instead of
serving with the default placement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..common.patching import PatchSet
from .patches import patch_sets
from .settings import PlacementSettings, remember


class CarriedSettings(PlacementSettings):
    """Settings whose unpickling applies the patches in the process that does so, be it forked, spawned or started by Ray."""

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (dict(self),)


def restore(data: dict[str, Any]) -> CarriedSettings:
    """Put settings that have arrived in a process into force: each patch when its module is imported."""
    return _into_force(CarriedSettings(data), PatchSet.apply_when_imported)


def put_into_force(settings: PlacementSettings) -> CarriedSettings:
    """Put settings into force in the process that made them, where vLLM is imported already.

    Returns:
        What is to be put into the engine's config.
    """
    return _into_force(CarriedSettings(settings), PatchSet.apply)


def _into_force(settings: CarriedSettings, apply: Callable[[PatchSet], None]) -> CarriedSettings:
    remember(settings)
    for patches in patch_sets(settings):
        apply(patches)
    if settings["record"] is not None:
        from .recording import install_metrics  # lazy: heavy

        # This process's ``/metrics`` reports what is recorded; only the API server's is ever asked.
        install_metrics(settings)
    return settings
