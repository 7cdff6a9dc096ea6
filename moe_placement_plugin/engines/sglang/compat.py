"""Find out which SGLang this is, and what it can do.

The installed package is asked; nothing is read off its version.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import lru_cache
from typing import Any

from packaging.version import InvalidVersion, Version

from ...core.errors import PlacementError

OLDEST, NEWEST = "0.5.16", "0.5.23"


def check_version(version: str) -> None:
    """Refuse a version of SGLang that this plugin was not written for.

    Raises:
        PlacementError: naming the version, the range and the mend.
    """
    try:
        release = Version(version).release
    except InvalidVersion:
        release = ()
    if not Version(OLDEST).release <= release <= Version(NEWEST).release:
        raise PlacementError(
            f"SGLang {version} is outside the supported range {OLDEST} to {NEWEST}: install a "
            "supported version, or leave the expert placement flags out"
        )


@lru_cache(maxsize=1)
def dispatch_is_rank_invariant() -> bool:
    """Tell whether every rank picks the same replicas without an all-to-all back end.

    So it is from SGLang 0.5.17 on.
    """
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    return "rank_invariant" in {f.name for f in dataclasses.fields(ExpertLocationDispatchInfo)}


@lru_cache(maxsize=1)
def topk_finds_the_placement() -> bool:
    """Tell whether the TopK layer looks up the placement itself, for every model and device.

    So it is from SGLang 0.5.23 on.
    """
    from sglang.srt.layers.moe import topk

    return hasattr(topk, "resolve_routing_inputs")


def takes_server_args(function: Any) -> bool:
    """Tell whether a function of `expert_location` still wants ``server_args`` (up to 0.5.18)."""
    return "server_args" in inspect.signature(function).parameters


def resolved(server_args: Any) -> Any:
    """Return the values that SGLang runs with.

    From 0.5.19 they lie beside the record of what was asked for.
    """
    if not hasattr(server_args, "resolve_once"):
        return server_args
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return resolving_view(server_args)


def attention_dp_width(values: Any) -> int:
    """Return how many groups of ranks have tokens of their own in attention.

    It is 1 without data-parallel attention. From 0.5.23 on it is ``attn_dp_size``: resolution turns
    ``--enable-dp-attention --dp-size N`` into it, and leaves False and 1 behind.

    Args:
        values: SGLang's resolved arguments.
    """
    width = int(getattr(values, "attn_dp_size", None) or 1)
    if width > 1 or not getattr(values, "enable_dp_attention", False):
        return width
    return int(values.dp_size)


def replicas(values: Any) -> int:
    """Return the number of data-parallel copies of the whole server.

    Up to 0.5.22 ``dp_size`` counts groups of attention where it is data-parallel.

    Args:
        values: SGLang's resolved arguments.
    """
    return 1 if getattr(values, "enable_dp_attention", False) else int(values.dp_size or 1)


def decide(server_args: Any, **values: Any) -> None:
    """Change resolved values of ``server_args`` before SGLang publishes them to its processes."""
    from sglang.srt.arg_groups import overrides

    declare = getattr(overrides, "declare_resolution", None) or getattr(
        overrides, "declare_late_resolution", None
    )
    if declare is not None:
        declare(server_args, "moe_placement_plugin", **values)
    else:  # up to 0.5.17
        server_args.override("moe_placement_plugin", **values)


def model_config(server_args: Any) -> Any:
    """Return SGLang's ``ModelConfig`` of the model that ``server_args`` names."""
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(server_args)
