"""All patches of a vLLM with our settings, and which of them the settings call for."""

from __future__ import annotations

from functools import lru_cache

from ..common.patching import LOADING, PLACEMENT, PatchSet
from ..common.settings import Settings


@lru_cache(maxsize=1)
def patch_set() -> PatchSet:
    """Return the patches that place experts, and on the CPU build those that make its kernels honour
    expert maps.
    """
    from .cpu import cpu_patches  # lazy: heavy
    from .detect import is_cpu_build  # lazy: heavy
    from .expert_maps import static_patches  # lazy: heavy

    return PatchSet([*static_patches(), *(cpu_patches() if is_cpu_build() else ())], PLACEMENT)


@lru_cache(maxsize=1)
def eplb_set() -> PatchSet:
    """Return the patches of a placement under vLLM's EPLB, which its CPU build lacks altogether."""
    from .detect import is_cpu_build  # lazy: heavy
    from .eplb import eplb_patches  # lazy: heavy
    from .eplb_cpu import cpu_eplb_patches  # lazy: heavy

    return PatchSet([*eplb_patches(), *(cpu_eplb_patches() if is_cpu_build() else ())])


@lru_cache(maxsize=1)
def load_set() -> PatchSet:
    """Return the patches that check what was loaded, at the start and while serving."""
    from .loading import load_patches  # lazy: heavy

    return PatchSet(load_patches(), LOADING)


@lru_cache(maxsize=1)
def lora_set() -> PatchSet:
    """Return the patches that make LoRA adapters of experts follow the placement."""
    from .lora import lora_patches  # lazy: heavy

    return lora_patches()


@lru_cache(maxsize=1)
def host_set() -> PatchSet:
    """Return the patch that makes the workers of several hosts agree."""
    from .hosts import host_patches  # lazy: heavy

    return PatchSet(host_patches())


@lru_cache(maxsize=1)
def recording_set() -> PatchSet:
    """Return the patches that record the expert load."""
    from .recording import recording_patches  # lazy: heavy

    return recording_patches()


def patch_sets(settings: Settings) -> list[PatchSet]:
    """Choose the patches that the settings call for, and no others."""
    from .detect import is_cpu_build  # lazy: heavy

    places = settings.places or settings.adopts
    sets = []
    if settings.rebalancing.moves:
        sets.append(eplb_set())
    if places or (settings.ep_size > 1 and is_cpu_build()):
        sets.append(patch_set())
    if settings.loading.lora and places:
        sets.append(lora_set())
    if sets or settings.verification.on:
        sets.append(load_set())
    if settings.hosts is not None:
        sets.append(host_set())
    if settings.recording is not None:
        sets.append(recording_set())
    return sets
