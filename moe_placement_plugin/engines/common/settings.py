"""Hold what every process of an engine must know.

The launcher makes it once; it is frozen, and the same for both engines.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...core.placement import Placement
from ...formats.packed import pack, unpack


@dataclass(frozen=True)
class PlacementSettings:
    """Say where experts lie, or where EPLB begins.

    Attributes:
        strategy: name of the strategy in force.
        plan: the placement of the model's MoE layers; None leaves the engine's own, or comes from
            the head.
        source: the file that it was read from, for messages.
        exact: the plan comes from a file, so that it must cover the model layer by layer; a
            strategy that needs none can place layers that were not foreseen.
        redundant: redundant experts per layer, of all ranks, padding included.
        padding: those of them that were added so that the slots divide over the ranks.
    """

    strategy: str
    plan: Placement | None = None
    source: str = ""
    exact: bool = False
    redundant: int = 0
    padding: int = 0


@dataclass(frozen=True)
class VerificationSettings:
    """Say how far weights are verified.

    Attributes:
        level: see `verification.level`.
        asked: the user named the level, so that what cannot be verified is refused.
    """

    level: str = "off"
    asked: bool = False

    @property
    def on(self) -> bool:
        """Tell whether anything is verified."""
        return self.level != "off"


@dataclass(frozen=True)
class RecordingSettings:
    """Say what is recorded.

    Attributes:
        path: the recording.
        interval: seconds between two writes.
        coactivation: whether pairs are counted.
        num_experts: logical experts of the model.
        model: its name.
        ep_ranks: ranks that own whole experts; None where that is not so, or changes while EPLB
            moves them.
    """

    path: str
    interval: float
    coactivation: bool = False
    num_experts: int = 0
    model: str = ""
    ep_ranks: int | None = None


@dataclass(frozen=True)
class RebalancingSettings:
    """Say who moves experts while the server serves.

    Attributes:
        moves: the engine's EPLB does; the placement is then where it begins.
        plans: our planner decides what moves.
        rules: rules that the user gave, see `rebalancing.rebalancer.policy_from`.
        elastic: the server goes on when ranks die.
    """

    moves: bool = False
    plans: bool = False
    rules: dict[str, Any] | None = None
    elastic: bool = False


@dataclass(frozen=True)
class HostSettings:
    """Say how several hosts agree, each of which reads the flags by itself.

    Attributes:
        timeout: seconds after which a silent host counts as gone.
        nodes: hosts, where the engine says how many.
        adopts: this host has no file, the placement comes from the head.
        error: why this host cannot have what was asked for; its workers tell the other hosts, and
            all stop.
    """

    timeout: float
    nodes: int = 1
    adopts: bool = False
    error: str | None = None


@dataclass(frozen=True)
class LoadingSettings:
    """Say what a loader does with the experts.

    Attributes:
        reads: weights come from a checkpoint; a dummy load format fills no slot by name.
        stages: pipeline stages; one of several may have no MoE layer.
        lora: the engine takes LoRA adapters, those of experts among them.
        direct: routing by logical expert may go to slots in one look-up.
    """

    reads: bool = True
    stages: int = 1
    lora: bool = False
    direct: bool = False


@dataclass(frozen=True)
class Settings:
    """Hold all of it.

    Attributes:
        placement: None where no placement was asked for.
        verification: how far weights are verified.
        recording: None records nothing.
        rebalancing: who moves experts.
        hosts: None on one host.
        loading: what the loader does.
        ep_size: EP ranks.
    """

    placement: PlacementSettings | None = None
    verification: VerificationSettings = VerificationSettings()
    recording: RecordingSettings | None = None
    rebalancing: RebalancingSettings = RebalancingSettings()
    hosts: HostSettings | None = None
    loading: LoadingSettings = LoadingSettings()
    ep_size: int = 1

    @property
    def plan(self) -> Placement | None:
        """Return the placement of the model's MoE layers, None for the engine's own."""
        return None if self.placement is None else self.placement.plan

    @property
    def static(self) -> Placement | None:
        """Return the placement that holds while the server runs; None where EPLB moves experts."""
        return None if self.rebalancing.moves else self.plan

    @property
    def strategy(self) -> str:
        """Return the name of the strategy in force."""
        return "linear" if self.placement is None else self.placement.strategy

    @property
    def adopts(self) -> bool:
        """Tell whether the head's placement is still to come."""
        return self.hosts is not None and self.hosts.adopts

    @property
    def places(self) -> bool:
        """Tell whether experts lie, or will lie, where the engine's own placement has others."""
        return self.plan is not None or self.rebalancing.moves

    def adopting(self, plan: Placement | None, exact: bool) -> Settings:
        """Return the settings with the head's placement in place of this host's."""
        assert self.placement is not None and self.hosts is not None, "only such a host adopts"
        placement = replace(self.placement, plan=plan, exact=exact)
        return replace(self, placement=placement, hosts=replace(self.hosts, adopts=False))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-compatible values, the plan packed."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, part in data.items():
            if name == "placement" and part is not None:
                own = {f.name: getattr(part, f.name) for f in fields(part)}
                data[name] = own | {"plan": None if part.plan is None else pack(part.plan)}
            elif name in _PARTS and part is not None:
                data[name] = asdict(part)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Make settings of what `to_dict` gave."""
        parts = {
            name: None if data[name] is None else part(**data[name])
            for name, part in _PARTS.items()
        }
        if (placement := parts["placement"]) is not None and placement.plan is not None:
            parts["placement"] = replace(placement, plan=unpack(placement.plan))
        return cls(**{**data, **parts})


_PARTS: dict[str, Any] = {
    "placement": PlacementSettings,
    "verification": VerificationSettings,
    "recording": RecordingSettings,
    "rebalancing": RebalancingSettings,
    "hosts": HostSettings,
    "loading": LoadingSettings,
}
