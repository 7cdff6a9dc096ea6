"""Hold what this process, worker or launcher, knows of the engine that it is a part of."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.load import MIXED
from ...core.placement import Placement
from ..common.request import Request
from ..common.settings import Settings

if TYPE_CHECKING:
    from ...rebalancing.exchanger import Exchanger, RankFacts
    from ...rebalancing.policy import RebalancePolicy
    from ...rebalancing.rebalance import Rebalance
    from ...rebalancing.rebalancer import Rebalancer
    from .drafts import DraftLoading
    from .expert_reader import EngineReader, Names, Wanted
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
class Eplb:
    """Hold what we know of SGLang's EPLB, from the moment that the model is loaded.

    Attributes:
        facts: what the EP ranks have told each other.
        model: that is served.
        policy: the user's rules.
        rebalancer: plans and decides; None before the first rebalance, and where SGLang's own
            algorithm does.
        exchanger: moves experts; None before the first exchange.
        reader: of lost experts; None before the first is read.
        viewed: the generation of weights that exchanger and reader have views of.
        rebalance: the one under way; None between two of its chunks, where the server serves.
    """

    facts: RankFacts
    model: Any
    policy: RebalancePolicy
    rebalancer: Rebalancer | None = None
    exchanger: Exchanger | None = None
    reader: EngineReader | None = None
    viewed: int = 0
    rebalance: Rebalance | None = None


@dataclass
class ForwardPasses:
    """Hold what the forward passes in SGLang's recorder were.

    Attributes:
        phase: of the one that runs.
        in_buffer: place in the recorder's buffer -> phase.
    """

    phase: str = MIXED
    in_buffer: dict[int, str] = field(default_factory=dict)


@dataclass
class CheckpointNames:
    """Hold which tensors of the checkpoint hold which expert.

    Attributes:
        learning: what is noted while a model loads; None otherwise.
        known: what was noted; None while the weights are in no checkpoint.
        wanted: experts that are being read; None otherwise.
    """

    learning: Names | None = None
    known: Names | None = None
    wanted: Wanted | None = None


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
        eplb: None in a server whose experts stay, and before the model is loaded.
        passes: of the recorder.
        names: of the checkpoint's tensors.
    """

    settings: Settings | None = None
    target: TargetLoading | None = None
    draft: DraftLoading | None = None
    draft_layers: dict[int, str] = field(default_factory=dict)
    brought: Shards = field(default_factory=lambda: defaultdict(set))
    filled: Shards = field(default_factory=lambda: defaultdict(set))
    generation: int = 0
    eplb: Eplb | None = None
    passes: ForwardPasses = field(default_factory=ForwardPasses)
    names: CheckpointNames = field(default_factory=CheckpointNames)


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
    """Tell whether this process verifies weights."""
    return STATE.settings is not None and STATE.settings.verification.on
