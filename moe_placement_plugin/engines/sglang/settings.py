"""What the user asked for, carried from the launcher to every worker process.

The settings ride as a plain attribute on SGLang's ``ServerArgs``: a new *field* would have to exist in a child process
before the child has loaded its plugins. Unpickling the attribute is also how a child learns that a placement is
wanted, before its plugins load: without it nothing is patched there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...core.placement import Placement

ATTRIBUTE = "_moe_placement"

# ServerArgs.init_expert_location while a placement is asked for. Any value but "trivial" makes SGLang remap routing;
# a process without this plugin tries to read the file and dies, naming it: no file can lie below /dev/null.
SENTINEL = "/dev/null/moe_placement_plugin is not loaded in this process.json"

_current: Settings | None = None


@dataclass
class Settings:
    """The request and, once the launcher has resolved it, the answer.

    Attributes:
        strategy: value of ``--expert-placement-strategy``.
        file: value of ``--expert-placement-file``.
        dispatch_algorithm: ``--ep-dispatch-algorithm`` as the user gave it, None when not given.
        placement: the resolved placement; None until the launcher has made it.
        padding: redundant slots added so that the slots divide over the ranks.
        reads: whether weights come from a checkpoint (a dummy load format fills no slot by name).
        stages: pipeline stages; one of several may have no MoE layer.
        rebalance: rules that the user gave, see `rebalancer.policy_from`.
        moves: whether SGLang's EPLB moves experts while serving; the placement is then where it begins.
        elastic: whether the server goes on when ranks die.
        direct: whether routing by logical expert may go to slots in one look-up, see `direct`.
        planner: whether the user chose our planner by ``--eplb-algorithm``, whatever the strategy.
        locality: value of ``--expert-placement-locality``.
        host_timeout: value of ``--expert-host-timeout``, None when not given.
        nodes: hosts, each of which reads the flags by itself.
        adopts: this host has no file, the placement comes from the head.
        error: why this host cannot have what was asked for; its workers tell the other hosts, and all stop.
    """

    strategy: str
    file: str | None = None
    dispatch_algorithm: str | None = None
    placement: Placement | None = None
    padding: int = 0
    reads: bool = True
    stages: int = 1
    rebalance: dict[str, Any] | None = None
    moves: bool = False
    elastic: bool = False
    direct: bool = False
    planner: bool = False
    locality: str = "none"
    host_timeout: float | None = None
    nodes: int = 1
    adopts: bool = False
    error: str | None = None

    @property
    def plans(self) -> bool:
        """Whether our planner rebalances under EPLB: if chosen, or by strategy eplb, which linear, the default, means where a file decides."""
        return (
            self.planner
            or self.strategy == "eplb"
            or (self.strategy == "linear" and self.file is not None)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        set_current(self)


class _Carried(str):
    """The settings, which whoever writes all attributes of ``ServerArgs`` down sees as a word: SGLang 0.5.16 answers /server_info with them."""

    settings: Settings

    def __new__(cls, settings: Settings) -> _Carried:
        word = super().__new__(cls, settings.strategy)
        word.settings = settings
        return word

    def __reduce__(self) -> tuple[type, tuple[Settings]]:
        return _Carried, (self.settings,)


def set_current(settings: Settings | None) -> None:
    """Make ``settings`` those of this process."""
    global _current
    _current = settings


def current() -> Settings | None:
    """The settings of this process: of the last ``ServerArgs`` that was made or received here; None without the flag."""
    return _current


def of(server_args: Any) -> Settings | None:
    """The settings that ``server_args`` carries."""
    carried = getattr(server_args, ATTRIBUTE, None)
    return None if carried is None else carried.settings


def attach(server_args: Any, settings: Settings) -> None:
    """Make ``server_args`` carry ``settings``."""
    setattr(server_args, ATTRIBUTE, _Carried(settings))
    set_current(settings)
