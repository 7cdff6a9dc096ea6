"""Hold what the user asked of this plugin, as both engines understand it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import PlacementError
from ...strategies import get_strategy
from . import options


@dataclass(frozen=True)
class Request:
    """Hold the flags of one server.

    Attributes:
        strategy: value of ``--expert-placement-strategy``, an alias resolved; ``linear`` without
            it.
        named: the value as it was typed.
        places: whether a placement was asked for.
        file: value of ``--expert-placement-file``.
        locality: value of ``--expert-placement-locality``, None without it.
        verify: value of ``--expert-placement-verify``, None without it.
        rebalance: value of ``--expert-rebalance``, None without it.
        host_timeout: value of ``--expert-host-timeout`` in seconds, None without it.
        record: value of ``--expert-load-record``.
        interval: value of ``--expert-load-interval``.
        coactivation: whether ``--expert-load-coactivation`` was given.
        planner: whether our planner was chosen by SGLang's ``--eplb-algorithm``, whatever the
            strategy.
        dispatch: SGLang's ``--ep-dispatch-algorithm`` as the user gave it.
    """

    strategy: str = "linear"
    named: str = "linear"
    places: bool = False
    file: str | None = None
    locality: str | None = None
    verify: str | None = None
    rebalance: dict[str, Any] | None = None
    host_timeout: float | None = None
    record: str | None = None
    interval: Any = None
    coactivation: bool = False
    planner: bool = False
    dispatch: str | None = None

    @property
    def flag(self) -> str:
        """Return the placement flag with its value, for messages."""
        if self.file is not None:
            return f"{options.FILE.flag} {self.file}"
        return f"{options.STRATEGY.flag} {self.named}"

    @property
    def plans(self) -> bool:
        """Tell whether our planner rebalances under EPLB.

        It does if chosen, or by strategy eplb, which linear, the default, means where a file
        decides.
        """
        decides = self.strategy == "linear" and self.file is not None
        return self.planner or self.strategy == "eplb" or decides

    def with_dispatch(self, algorithm: str | None) -> Request:
        """Return the request with SGLang's ``--ep-dispatch-algorithm``."""
        return replace(self, dispatch=algorithm)

    @property
    def needs_file(self) -> bool:
        """Tell whether the placement depends on what only a host with the right file can read."""
        return self.file is not None or get_strategy(self.strategy).needs_load

    def waits_for_head(self, eplb: bool) -> bool:
        """Tell whether this host, not being the head, lacks the placement's file.

        Args:
            eplb: whether the engine's EPLB moves the experts, which may begin without a load.
        """
        if self.file is not None:
            return not Path(self.file).exists()
        return get_strategy(self.strategy).needs_load and not eplb


def request_from(
    values: Mapping[str, Any], strategy: str, named: str, places: bool, planner: bool = False
) -> Request:
    """Make the request of an engine's arguments.

    Args:
        values: keyword -> value, of our flags only.
        strategy: the strategy, an alias resolved.
        named: the strategy as it was typed.
        places: whether a placement was asked for.
        planner: see `Request`.
    """
    file, record = values.get(options.FILE.name), values.get(options.RECORD.name)
    return Request(
        strategy,
        named,
        places,
        None if file is None else str(file),
        values.get(options.LOCALITY.name),
        values.get(options.VERIFY.name),
        values.get(options.REBALANCE.name),
        values.get(options.HOST_TIMEOUT.name),
        None if record is None else str(record),
        values.get(options.INTERVAL.name),
        bool(values.get(options.COACTIVATION.name)),
        planner,
    )


def check_recording_flags(request: Request) -> None:
    """Refuse flags about a recording where there is none.

    Raises:
        PlacementError: naming the flag.
    """
    given = {options.INTERVAL: request.interval, options.COACTIVATION: request.coactivation}
    for option, value in given.items():
        if value and request.record is None:
            raise PlacementError(
                f"{option.flag} without {options.RECORD.flag}: nothing is recorded; add the path"
            )
