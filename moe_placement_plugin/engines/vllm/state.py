"""Worker and launcher: what this process knows of the engine that it is a part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.load import MIXED
from ..common.settings import Settings

if TYPE_CHECKING:
    from ...rebalancing.exchanger import ExchangeLimits, Exchanger
    from ...rebalancing.rebalance import Rebalance
    from ...rebalancing.rebalancer import Rebalancer

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
class Progress:
    """Tell how far an async rebalance has come.

    Attributes:
        since: monotonic time of the last step forward.
        at: whether vLLM is rebalancing, and the layer that this rank has ready; None before.
        reported: how often it was reported that nothing goes on.
    """

    since: float
    at: tuple[bool, int | None] | None = None
    reported: int = 0


@dataclass
class EplbModel:
    """Hold one model whose experts EPLB moves.

    Attributes:
        state: vLLM's ``EplbModelState``.
        exchanger: moves its experts; None where vLLM's communicator transfers in a way of its own.
        rebalancer: plans and decides; None where vLLM's own policy does.
        counted_by: ranks that count the same token, so that vLLM's sum over ranks holds it as
            often.
        rebalance: the one under way, in async mode the last one; None otherwise.
        progress: of an async rebalance; None before the first step.
    """

    state: Any
    exchanger: Exchanger | None = None
    rebalancer: Rebalancer | None = None
    counted_by: int = 1
    rebalance: Rebalance | None = None
    progress: Progress | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (layers, logical experts)."""
        return tuple(self.state.logical_replica_count.shape)


@dataclass
class Eplb:
    """Hold what we know of vLLM's EPLB in a server with our settings.

    Attributes:
        owner: vLLM's ``EplbState``.
        watchdog: seconds after which what does not finish is reported.
        limits: of exchanges.
        models: in the order in which vLLM has registered them.
        step_phase: of the step that runs.
        window: phase of each step in vLLM's window of loads; empty before the first.
    """

    owner: Any
    watchdog: float
    limits: ExchangeLimits
    models: list[EplbModel] = field(default_factory=list)
    step_phase: str = MIXED
    window: list[str] = field(default_factory=list)

    def with_state(self, state: Any) -> EplbModel | None:
        """Return the model that vLLM keeps this ``EplbModelState`` of."""
        return next((model for model in self.models if model.state is state), None)

    def with_weights(self, weights: Any) -> EplbModel | None:
        """Return the model whose list of expert weights this is."""
        found = (m for m in self.models if m.state.model.expert_weights is weights)
        return next(found, None)

    def with_communicator(self, communicator: Any) -> EplbModel | None:
        """Return the model whose experts vLLM sends by this communicator."""
        found = (model for model in self.models if model.state.communicator is communicator)
        return next(found, None)

    def planned_by_us(self, shape: tuple[int, ...]) -> EplbModel | None:
        """Return the model of so many layers and experts that we plan for.

        vLLM has one policy for a model and its draft, and hands it nothing but their loads.
        """
        ours = (model for model in reversed(self.models) if model.rebalancer is not None)
        return next((model for model in ours if model.shape == shape), None)


@dataclass
class WorkerState:
    """Hold what one process of an engine keeps.

    Attributes:
        settings: those that were made in or sent to this process last, for code that vLLM calls
            outside of any config's context.
        eplb: of the EPLB that was begun last; None in a server without.
    """

    settings: Settings | None = None
    eplb: Eplb | None = None

    def eplb_of(self, owner: Any) -> Eplb | None:
        """Return what belongs to an ``EplbState``; None if that is of no server with settings."""
        return self.eplb if self.eplb is not None and self.eplb.owner is owner else None


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
