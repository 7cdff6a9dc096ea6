"""All patches that are active in an engine with a placement or a recording."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..common.patching import LOADING, PLACEMENT, PatchSet


@lru_cache(maxsize=1)
def patch_set() -> PatchSet:
    """The patches that place experts, and on the CPU build those that make its kernels honour expert maps."""
    from .cpu import cpu_patches  # lazy: heavy
    from .detect import is_cpu_build  # lazy: heavy
    from .expert_maps import static_patches  # lazy: heavy

    return PatchSet([*static_patches(), *(cpu_patches() if is_cpu_build() else ())], PLACEMENT)


@lru_cache(maxsize=1)
def eplb_set() -> PatchSet:
    """The patches of a placement under vLLM's EPLB, which its CPU build lacks altogether."""
    from .detect import is_cpu_build  # lazy: heavy
    from .eplb import eplb_patches  # lazy: heavy
    from .eplb_cpu import cpu_eplb_patches  # lazy: heavy

    return PatchSet([*eplb_patches(), *(cpu_eplb_patches() if is_cpu_build() else ())])


@lru_cache(maxsize=1)
def load_set() -> PatchSet:
    """The patch that checks what was loaded."""
    from .loading import load_patches  # lazy: heavy

    return PatchSet(load_patches(), LOADING)


@lru_cache(maxsize=1)
def lora_set() -> PatchSet:
    """The patches that make LoRA adapters of experts follow the placement."""
    from .lora import lora_patches  # lazy: heavy

    return lora_patches()


@lru_cache(maxsize=1)
def host_set() -> PatchSet:
    """The patch that makes the workers of several hosts agree."""
    from .hosts import host_patches  # lazy: heavy

    return PatchSet(host_patches())


@lru_cache(maxsize=1)
def recording_set() -> PatchSet:
    """The patches that record the expert load."""
    from .recording import recording_patches  # lazy: heavy

    return recording_patches()


def patch_sets(settings: Mapping[str, Any]) -> list[PatchSet]:
    """The patches that the settings call for, and no others.

    Args:
        settings: a `settings.PlacementSettings`.
    """
    from .detect import is_cpu_build  # lazy: heavy

    sets = []
    if settings["eplb"]:
        sets.append(eplb_set())
    to_come = settings["hosts"] is not None and settings["hosts"]["adopt"]
    if (
        settings["plan"] is not None
        or to_come
        or settings["eplb"]
        or (settings["ep_size"] > 1 and is_cpu_build())
    ):
        sets.append(patch_set())
    if settings["lora"] and (settings["plan"] is not None or to_come or settings["eplb"]):
        sets.append(lora_set())
    if sets or settings["verify"] != "off":
        sets.append(load_set())
    if settings["hosts"] is not None:
        sets.append(host_set())
    if settings["record"] is not None:
        sets.append(recording_set())
    return sets
