"""The placement flags in the process that starts the server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ...core.errors import PlacementError
from ...rebalancing.rebalancer import REBALANCE_FLAG
from ...rebalancing.rebalancer import add_argument as add_rebalance_argument
from ...strategies.registry import ALIASES, get_strategy, strategy_names
from ..common import host_flags
from . import recording, settings, verification
from .compat import check_version
from .hook_registry import AttributeHook, Hook, HookSet

ALGORITHM = "expert_placement"
"""Value of ``--eplb-algorithm`` for our planner, with any strategy to begin with."""

FLAGS = (
    "expert_placement_strategy",
    "expert_placement_file",
    "expert_rebalance",
    "expert_placement_locality",
    "expert_host_timeout",
)


def request(values: dict[str, Any]) -> settings.Settings | None:
    """Take the placement flags out of ``values`` (arguments of ``ServerArgs``), and check what can be checked already.

    With a placement asked for, ``init_expert_location`` becomes `settings.SENTINEL`.

    Raises:
        PlacementError: unknown strategy, conflicting flags, unsupported SGLang.
    """
    strategy, file, rebalance, locality, host_timeout = (values.pop(flag, None) for flag in FLAGS)
    planner = values.get("eplb_algorithm") == ALGORITHM
    if planner:
        values["eplb_algorithm"] = (
            "auto"  # SGLang's list is closed; our hook is asked whatever it names
        )
        strategy = "eplb" if strategy is None and file is None else strategy
    if strategy is None and file is None:
        if rebalance is not None:
            raise PlacementError(
                f"{REBALANCE_FLAG} without --expert-placement-strategy eplb: nothing of ours rebalances; add it, or leave it out"
            )
        for flag, value in (
            (host_flags.LOCALITY_FLAG, locality),
            (host_flags.TIMEOUT_FLAG, host_timeout),
        ):
            if value is not None:
                raise PlacementError(
                    f"{flag} {value} without an expert placement: add --expert-placement-strategy, or leave it out"
                )
        return None
    import sglang

    check_version(sglang.__version__)
    strategy = get_strategy(strategy or "linear").name
    given = values.get("init_expert_location") or "trivial"
    if given != "trivial":
        raise PlacementError(
            f"--init-expert-location {given} together with --expert-placement-"
            f"{'file' if file else 'strategy'}: both decide where the experts lie; leave one out (--expert-placement-file "
            "reads the same files)"
        )
    values["init_expert_location"] = settings.SENTINEL
    return settings.Settings(
        strategy,
        None if file is None else str(file),
        values.get("ep_dispatch_algorithm"),
        rebalance=rebalance,
        planner=planner,
        locality=locality or "none",
        host_timeout=host_timeout,
    )


def build(original: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Make ``ServerArgs`` by ``original(**values)`` without our flags, and let it carry what they ask for.

    It is resolved once SGLang has resolved its own arguments.

    Raises:
        PlacementError: when what was asked for cannot be had.
    """
    record = recording.request(values)
    asked = request(values)
    verify = verification.request(values, asked is not None)
    server_args = original(**values)
    if asked is not None:
        settings.attach(server_args, asked)
    if verify is not None:
        verification.attach(server_args, verify)
        ON_REQUEST.apply_now()
    return recording.accept(server_args, record)


def _add_cli_args(original: Callable, *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    parser: argparse.ArgumentParser = args[-1] if args else kwargs["parser"]
    group = parser.add_argument_group("expert placement (moe-placement-plugin)")
    group.add_argument(
        "--expert-placement-strategy",
        type=str,
        choices=[*strategy_names(), *ALIASES],
        default=None,
        help="Which expert parallel rank holds which expert: linear (contiguous blocks), balanced (the same, for counts that "
        "do not divide over the ranks), zigzag (expert e on rank e mod ranks) or eplb (from a recorded load).",
    )
    group.add_argument(
        "--expert-placement-file",
        type=str,
        default=None,
        help="A plan (decides alone) or a recorded load (for eplb), told apart by content.",
    )
    add_rebalance_argument(group)
    host_flags.add_arguments(group)
    verification.add_arguments(group)
    recording.add_arguments(group)
    return result


def _from_cli_args(original: Callable, cls: type, args: argparse.Namespace) -> Any:
    return build(lambda **values: original(cls, argparse.Namespace(**values)), dict(vars(args)))


class ServerArgsFactory:
    """Stands in for the class in ``Engine.server_args_class``, which `sglang.Engine` calls with the user's arguments.

    An instance, not a function: a function in its place would be bound to the engine.
    """

    def __init__(self, original: Any):
        self.original = original

    def __call__(self, **kwargs: Any) -> Any:
        return build(self.original, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def _check_server_args(original: Callable, server_args: Any) -> Any:
    asked = settings.of(server_args)
    if asked is not None:
        from .resolve import finish  # lazy: numba

        finish(server_args, asked)
    verification.settle(server_args)
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
            why="the placement needs SGLang's resolved arguments and must be decided before workers start",
            removable_when="SGLang reads placement plans and strategies itself",
        ),
    ]
)
"""What the launcher gets when a placement or a verification is asked for."""
