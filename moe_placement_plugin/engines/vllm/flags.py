"""The flags: accepted in ``vllm serve``, the api_server module, ``--config`` YAML and ``LLM(...)``."""

from __future__ import annotations

import functools
import typing
from typing import Any

from ...strategies import ALIASES, get_strategy, strategy_names
from ..common import options
from ..common.options import add_options
from ..common.patching import Patch, PatchSet
from .detect import KEYS


class StrategyChoices(Patch):
    """Our values in the ``Literal`` type of ``ParallelConfig.expert_placement_strategy``.

    pydantic compiled the old values into the class's validator and vLLM cached the parser's choices, so both
    are rebuilt.
    """

    FIELD = "expert_placement_strategy"

    def __init__(self) -> None:
        super().__init__(
            name="strategy-choices",
            target="vllm.config.parallel:ParallelConfig.__dataclass_fields__",
            make=lambda original: original,
            why="vLLM's --expert-placement-strategy knows only linear and round_robin",
            upstream="vLLM PR 23745",
            removable_when="vLLM takes placement strategies from plugins",
        )

    def check(self) -> str | None:
        from vllm.config.parallel import ParallelConfig

        field = ParallelConfig.__dataclass_fields__.get(self.FIELD)
        if field is None or typing.get_origin(field.type) is not typing.Literal:
            return f"ParallelConfig.{self.FIELD} is not a field of Literal type"
        return None

    def apply(self) -> None:
        if self.state == "applied":
            return
        self.require_fit()
        from vllm.config.parallel import ParallelConfig

        self._original = ParallelConfig.__dataclass_fields__[self.FIELD].type
        values = dict.fromkeys(
            (*typing.get_args(self._original), *strategy_names(), *ALIASES)
        )  # vLLM's own first
        self._set(typing.Literal[tuple(values)])
        self.state = "applied"

    def undo(self) -> None:
        if self.state == "applied":
            self._set(self._original)
        self.state = "off"

    def _set(self, literal: Any) -> None:
        from pydantic.dataclasses import rebuild_dataclass
        from vllm.config.parallel import ParallelConfig
        from vllm.engine import arg_utils

        ParallelConfig.__dataclass_fields__[self.FIELD].type = literal
        ParallelConfig.__annotations__[self.FIELD] = literal
        rebuild_dataclass(ParallelConfig, force=True)
        arg_utils._compute_kwargs.cache_clear()


def _add_cli_args(original):
    def add_cli_args(parser, *args, **kwargs):
        parser = original(parser, *args, **kwargs)
        if not any(options.FILE.flag in action.option_strings for action in parser._actions):
            group = parser.add_argument_group(
                "moe_placement_plugin", "Placement of experts on expert parallel ranks."
            )
            add_options(group, "vllm")
        return parser

    return add_cli_args


def _from_cli_args(original):
    def from_cli_args(cls, args):
        given = {key: getattr(args, key) for key in KEYS if getattr(args, key, None) is not None}
        if given:
            args.additional_config = {**(getattr(args, "additional_config", None) or {}), **given}
        return original(cls, args)

    return from_cli_args


def _init(original):
    def __init__(self, *args, **kwargs):
        given = {key: value for key in KEYS if (value := kwargs.pop(key, None)) is not None}
        for key in (options.FILE.name, options.RECORD.name):
            if key in given:
                given[key] = str(given[key])
        if given:
            kwargs["additional_config"] = {**(kwargs.get("additional_config") or {}), **given}
        original(self, *args, **kwargs)

    return __init__


def _create_engine_config(original):
    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        from . import resolve, support  # lazy: heavy
        from .carrier import attach  # lazy: heavy
        from .detect import asks, is_cpu_build  # lazy: heavy
        from .eplb_cpu import allow_eplb_on_cpu  # lazy: heavy

        if not asks(self):
            return original(self, *args, **kwargs)
        support.check_version()
        strategy = self.expert_placement_strategy
        placed = strategy != "linear" or options.FILE.name in (self.additional_config or {})
        if self.enable_eplb and placed and is_cpu_build():
            allow_eplb_on_cpu(self)
        if strategy not in ("linear", *ALIASES):
            get_strategy(strategy)  # an unknown name is refused before vLLM reads the model
        config = original(self, *args, **kwargs)
        settings = resolve.resolve(config)
        if settings is not None:
            attach(config, settings)
        return config

    return create_engine_config


_ARGS = "vllm.engine.arg_utils"

FLAGS = PatchSet(
    [
        StrategyChoices(),
        Patch(
            "file-flag",
            f"{_ARGS}:EngineArgs.add_cli_args",
            _add_cli_args,
            relies_on=("parser",),
            why="vLLM has no flag for a placement file",
            upstream="vLLM issues 34297, 49572, 41141",
            removable_when="vLLM reads placement files",
        ),
        Patch(
            "file-from-cli",
            f"{_ARGS}:EngineArgs.from_cli_args",
            _from_cli_args,
            relies_on=("args",),
            why="EngineArgs drops arguments that are no fields of its own",
            removable_when="vLLM reads placement files",
        ),
        *(
            Patch(
                f"file-keyword-{name}",
                f"{_ARGS}:{name}.__init__",
                _init,
                relies_on=("additional_config",),
                why="LLM(expert_placement_file=...) passes its keywords on to EngineArgs",
                removable_when="vLLM reads placement files",
            )
            for name in ("EngineArgs", "AsyncEngineArgs")
        ),
        Patch(
            "resolve",
            f"{_ARGS}:EngineArgs.create_engine_config",
            _create_engine_config,
            why="the request is checked and the placement resolved once, before any process starts to load the model",
            removable_when="vLLM takes placement strategies from plugins",
        ),
    ]
)


def open_flags() -> None:
    """Make vLLM accept the flags in this process.

    Raises:
        PlacementError: when the installed vLLM differs from what the flags rely on. It is called only where a
            placement or a recording was asked for.
    """
    FLAGS.apply()
