"""Carry settings to every process of SGLang as a plain attribute of ``ServerArgs``.

A new *field* would have to exist in a child process before the child has loaded its plugins.
Unpickling the attribute is also how a child learns that something is wanted, before its plugins
load: without it nothing is patched there.
"""

from __future__ import annotations

from typing import Any

from ..common.request import Request
from ..common.settings import Settings
from .state import ATTRIBUTE, STATE, Carried


class Carrier(Carried):
    """Carry settings that become those of the process in which they are unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (self.settings, self.request)


def restore(settings: Settings, request: Request | None) -> Carrier:
    """Make settings that have arrived in a process those of the process."""
    STATE.settings = settings
    return Carrier(settings, request)


def attach(server_args: Any, settings: Settings, request: Request | None = None) -> None:
    """Make ``server_args`` carry settings, and the request until it is resolved."""
    setattr(server_args, ATTRIBUTE, restore(settings, request))
