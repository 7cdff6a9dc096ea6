"""Worker: keep what this process knows while it serves, in one object.

Each concern has a part of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.load import MIXED

if TYPE_CHECKING:
    from ...rebalancing.exchanger import Exchanger, RankFacts
    from ...rebalancing.rebalance import Rebalance
    from ...rebalancing.rebalancer import Rebalancer
    from .expert_reader import EngineReader, Names, Wanted


@dataclass
class Eplb:
    """Hold what we know of SGLang's EPLB, from the moment that the model is loaded.

    Attributes:
        facts: what the EP ranks have told each other.
        model: that is served.
        rebalancer: plans and decides; None before the first rebalance, and where SGLang's own
            algorithm does.
        exchanger: moves experts; None before the first exchange.
        reader: of lost experts; None before the first is read.
        viewed: the generation of weights that exchanger and reader have views of.
        rebalance: the one under way; None between two of its chunks, where the server serves.
    """

    facts: RankFacts
    model: Any
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
    """Hold all parts.

    Attributes:
        eplb: None in a server whose experts stay, and before the model is loaded.
        passes: of the recorder.
        names: of the checkpoint's tensors.
    """

    eplb: Eplb | None = None
    passes: ForwardPasses = field(default_factory=ForwardPasses)
    names: CheckpointNames = field(default_factory=CheckpointNames)


worker = WorkerState()
"""Of this process."""
