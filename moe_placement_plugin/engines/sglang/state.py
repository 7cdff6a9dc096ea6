"""Worker and launcher: what this process knows of the engine that it is a part of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.placement import Placement
from ..common.request import Request
from ..common.settings import Settings

if TYPE_CHECKING:
    from .drafts import DraftLoading
    from .verification import TargetLoading

ATTRIBUTE = "_moe_placement"
"""Attribute of ``ServerArgs`` that carries the settings."""

SENTINEL = "/dev/null/moe_placement_plugin is not loaded in this process.json"
"""``ServerArgs.init_expert_location`` while a placement is asked for.

Any value but "trivial" makes SGLang remap routing; a process without this plugin tries to read the
file and dies, naming it: no file can lie below /dev/null.
"""

Shards = dict[tuple[int, str, str], set[int]]
"""(layer, weight, shard) -> experts or slots."""


class Carried(str):
    """Carry the settings on ``ServerArgs``.

    Whoever writes all attributes of ``ServerArgs`` down sees a word: SGLang 0.5.16 answers
    /server_info with them.

    Attributes:
        settings: the settings; provisional until the launcher has resolved the request.
        request: what the user asked for, until it is resolved.
    """

    settings: Settings
    request: Request | None

    def __new__(cls, settings: Settings, request: Request | None = None) -> Carried:
        word = super().__new__(cls, settings.strategy)
        word.settings, word.request = settings, request
        return word


@dataclass
class WorkerState:
    """Hold what one process of an engine keeps.

    Attributes:
        settings: of the last ``ServerArgs`` that was made or received here.
        target: the target model's loading that is under way, where weights are verified.
        draft: the draft's loading that is under way.
        draft_layers: number -> name of the layers of all parts of this process's draft.
        brought: logical experts that a loader has brought.
        filled: slots of this rank that a loader has filled.
        generation: how often the served model's weights have changed; views of them are as old.
    """

    settings: Settings | None = None
    target: TargetLoading | None = None
    draft: DraftLoading | None = None
    draft_layers: dict[int, str] = field(default_factory=dict)
    brought: Shards = field(default_factory=lambda: defaultdict(set))
    filled: Shards = field(default_factory=lambda: defaultdict(set))
    generation: int = 0


STATE = WorkerState()
"""The state of this process."""


def carried_by(server_args: Any) -> Carried | None:
    """Return what carries the settings on ``server_args``."""
    return getattr(server_args, ATTRIBUTE, None)


def settings_of(server_args: Any) -> Settings | None:
    """Return the settings that ``server_args`` carries, None where nothing was asked of us."""
    carried = carried_by(server_args)
    return None if carried is None else carried.settings


def placing() -> Settings | None:
    """Return the settings of a process whose server was asked for a placement, else None."""
    settings = STATE.settings
    return None if settings is None or settings.placement is None else settings


def plan_here() -> Placement | None:
    """Return the placement that the target's layers are built by, None without one."""
    return None if STATE.settings is None else STATE.settings.plan


def verifies() -> bool:
    """Whether this process verifies weights."""
    return STATE.settings is not None and STATE.settings.verification.on
