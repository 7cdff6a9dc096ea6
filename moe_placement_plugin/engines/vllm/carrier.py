"""How settings reach every process of vLLM, and bring the patches into force there: by being unpickled.

They travel inside ``VllmConfig.additional_config``. A process without this package cannot read the
config and dies instead of serving with the default placement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..common.patching import PatchSet
from ..common.settings import Settings
from .patches import patch_sets
from .state import KEY, STATE, Carried


class Carrier(Carried):
    """Carry settings whose unpickling applies the patches in the process that does so, be it
    forked, spawned or started by Ray.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (dict(self),)


def restore(data: dict[str, Any]) -> Carrier:
    """Put settings that have arrived in a process into force: each patch when its module is imported."""
    known = {name: value for name, value in data.items() if name != "plugin"}
    return _into_force(Settings.from_dict(known), PatchSet.apply_when_imported)


def attach(vllm_config: Any, settings: Settings) -> None:
    """Put settings into force in the process that made them, where vLLM is imported already, and
    into the engine's config, which takes them to the others.
    """
    extra = vllm_config.additional_config or {}
    vllm_config.additional_config = {**extra, KEY: _into_force(settings, PatchSet.apply)}


def _into_force(settings: Settings, apply: Callable[[PatchSet], None]) -> Carrier:
    STATE.settings = settings
    for patches in patch_sets(settings):
        apply(patches)
    if settings.recording is not None:
        from .recording import install_metrics  # lazy: heavy

        # This process's ``/metrics`` reports what is recorded; only the API server's is ever asked.
        install_metrics(settings)
    return Carrier(settings)
