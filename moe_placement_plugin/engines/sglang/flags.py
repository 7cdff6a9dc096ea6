"""Put the flags into SGLang's parser and into ``sglang.Engine(...)``, in the launcher."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ...core.errors import PlacementError
from ...recording.recorder import DEFAULT_INTERVAL, check_interval, check_path
from ...strategies.registry import get_strategy
from ...verification.level import check_level
from ..common import options
from ..common.options import add_options, options_of
from ..common.request import Request, check_recording_flags, request_from
from ..common.settings import (
    PlacementSettings,
    RecordingSettings,
    Settings,
    VerificationSettings,
)
from .carrier import attach
from .compat import check_version
from .hook_registry import AttributeHook, Hook, HookSet
from .state import SENTINEL, carried_by

ALGORITHM = "expert_placement"
"""Value of ``--eplb-algorithm`` for our planner, with any strategy to begin with."""

NAMES = tuple(option.name for option in options_of("sglang"))
"""Our keywords of ``ServerArgs``."""


def read_request(values: dict[str, Any]) -> Request | None:
    """Take our flags out of ``values``, arguments of ``ServerArgs``, and check what can be checked.

    With a placement asked for, ``init_expert_location`` becomes `state.SENTINEL`.

    Returns:
        None where nothing is asked of this plugin.

    Raises:
        PlacementError: unknown strategy or level, conflicting flags, a recording that cannot be
            written, an unsupported SGLang.
    """
    ours = {name: values.pop(name, None) for name in NAMES}
    named, file = ours[options.STRATEGY.name], ours[options.FILE.name]
    planner = values.get("eplb_algorithm") == ALGORITHM
    if planner:
        # SGLang's list is closed; our hook is asked whatever it names.
        values["eplb_algorithm"] = "auto"
        named = "eplb" if named is None and file is None else named
    places = named is not None or file is not None
    strategy = get_strategy(named or "linear").name
    request = request_from(ours, strategy, named or "linear", places, planner)
    check_recording_flags(request)
    if not places:
        _check_flags_of_a_placement(request)
    if request.verify is not None:
        check_level(request.verify, places)
    if not (places or request.record or request.verify not in (None, "off")):
        return None
    import sglang

    check_version(sglang.__version__)
    if request.record is not None:
        check_path(request.record)
        check_interval(request.interval or DEFAULT_INTERVAL)
    if places:
        _check_location(request, values.get("init_expert_location") or "trivial")
        values["init_expert_location"] = SENTINEL
    return request


def _check_flags_of_a_placement(request: Request) -> None:
    if request.rebalance is not None:
        raise PlacementError(
            f"{options.REBALANCE.flag} without {options.STRATEGY.flag} eplb: nothing of ours "
            "rebalances; add it, or leave it out"
        )
    given = {options.LOCALITY: request.locality, options.HOST_TIMEOUT: request.host_timeout}
    for option, value in given.items():
        if value is not None:
            raise PlacementError(
                f"{option.flag} {value} without an expert placement: add {options.STRATEGY.flag}, "
                "or leave it out"
            )


def _check_location(request: Request, given: str) -> None:
    if given != "trivial":
        which = options.STRATEGY if request.file is None else options.FILE
        raise PlacementError(
            f"--init-expert-location {given} together with {which.flag}: both decide where the "
            f"experts lie; leave one out ({options.FILE.flag} reads the same files)"
        )


def build(original: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Make ``ServerArgs`` by ``original(**values)`` without our flags, carrying what they ask for.

    It is resolved once SGLang has resolved its own arguments.

    Raises:
        PlacementError: when what was asked for cannot be had.
    """
    request = read_request(values)
    dispatch = values.get("ep_dispatch_algorithm")
    server_args = original(**values)
    if request is not None:
        attach(server_args, _provisional(request), request.with_dispatch(dispatch))
        ON_REQUEST.apply_now()
        if request.record is not None:
            from .recording import install_metrics  # lazy: heavy

            install_metrics(server_args, request.record)
    return server_args


def _provisional(request: Request) -> Settings:
    """Make settings that say what is wanted, before it is known whether it can be had."""
    level = request.verify or ("replicas" if request.places else "off")
    recording = None
    if request.record is not None:
        interval = check_interval(request.interval or DEFAULT_INTERVAL)
        recording = RecordingSettings(request.record, interval, request.coactivation)
    return Settings(
        PlacementSettings(request.strategy) if request.places else None,
        VerificationSettings(level, request.verify is not None),
        recording,
    )


def _add_cli_args(original: Callable, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    parser: argparse.ArgumentParser = args[-1] if args else kwargs["parser"]
    add_options(parser.add_argument_group("expert placement (moe-placement-plugin)"), "sglang")
    return result


def _from_cli_args(original: Callable, cls: type, args: argparse.Namespace) -> Any:
    return build(lambda **values: original(cls, argparse.Namespace(**values)), dict(vars(args)))


class ServerArgsFactory:
    """Stand in for the class in ``Engine.server_args_class``.

    `sglang.Engine` calls it with the user's arguments. It is an instance, not a function: a
    function in its place would be bound to the engine.
    """

    def __init__(self, original: Any):
        self.original = original

    def __call__(self, **kwargs: Any) -> Any:
        return build(self.original, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _check_server_args(original: Callable, server_args: Any) -> Any:
    carried = carried_by(server_args)
    if carried is not None and carried.request is not None:
        from .resolve import resolve  # lazy: numba

        attach(server_args, resolve(server_args, carried.request))
    return original(server_args)


LAUNCHER = HookSet(
    [
        Hook(
            name="flags",
            target="sglang.srt.server_args:ServerArgs.add_cli_args",
            hook=_add_cli_args,
            relies_on=("parser",),
            why="SGLang has no extension point for command-line arguments",
            upstream="SGLang's plugin framework covers functions, not arguments",
            removable_when="plugins can add server arguments",
        ),
        Hook(
            name="arguments",
            target="sglang.srt.server_args:ServerArgs.from_cli_args",
            hook=_from_cli_args,
            relies_on=("cls", "args"),
            why="the parsed flags must reach ServerArgs without being fields of it",
            removable_when="plugins can add server arguments",
        ),
        AttributeHook(
            name="engine-arguments",
            target="sglang.srt.entrypoints.engine:Engine.server_args_class",
            make=ServerArgsFactory,
            why="sglang.Engine(expert_placement_strategy=...) must be accepted",
            removable_when="plugins can add server arguments",
        ),
    ]
)
"""What the launcher has without any flag: they accept the flags and change nothing else."""

ON_REQUEST = HookSet(
    [
        Hook(
            name="resolve",
            target="sglang.srt.server_args:ServerArgs.check_server_args",
            hook=_check_server_args,
            relies_on=("self",),
            why="what is asked for needs SGLang's resolved arguments, before workers start",
            removable_when="SGLang reads placement plans and strategies itself",
        ),
    ]
)
"""What the launcher gets when anything is asked for."""
