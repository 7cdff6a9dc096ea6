"""Worker and launcher: what this process knows of the engine that it is a part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..common.settings import Settings

KEY = "moe_placement_plugin"
"""Key of ``VllmConfig.additional_config``."""


class Carried(dict):
    """Hold settings in an engine's config: JSON-compatible values, which vLLM hashes with the rest.

    Attributes:
        settings: the settings; `put` replaces them for everything that holds this object.
    """

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__()
        self.put(settings)

    def put(self, settings: Settings) -> None:
        """Carry other settings from now on."""
        from ..._version import __version__  # lazy: heavy

        self.settings = settings
        self.clear()
        self.update(settings.to_dict(), plugin=__version__)


@dataclass
class WorkerState:
    """Hold what one process of an engine keeps.

    Attributes:
        settings: those that were made in or sent to this process last, for code that vLLM calls
            outside of any config's context.
    """

    settings: Settings | None = None


STATE = WorkerState()
"""The state of this process."""


def settings_of(vllm_config: Any) -> Settings | None:
    """Return the settings inside a ``VllmConfig``, None where nothing was asked of this plugin."""
    carried = carried_by(vllm_config)
    return None if carried is None else carried.settings


def carried_by(vllm_config: Any) -> Carried | None:
    """Return what carries the settings inside a ``VllmConfig``."""
    extra = getattr(vllm_config, "additional_config", None)
    found = extra.get(KEY) if isinstance(extra, dict) else None
    return found if isinstance(found, Carried) else None


def current_settings() -> Settings | None:
    """Return the settings of the engine whose model is being built or loaded in this process."""
    from vllm.config import get_current_vllm_config_or_none

    return settings_of(get_current_vllm_config_or_none())
