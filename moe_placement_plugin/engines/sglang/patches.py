"""List all patches of an SGLang with our settings, and choose which a worker needs.

The settings say which.
"""

from __future__ import annotations

from functools import lru_cache

from ...core.errors import PlacementError
from ..common.patching import DRAFT_RECORDING, EPLB, NEW_WEIGHTS, PLACEMENT, VERIFICATION
from ..common.settings import Settings
from . import (
    cpu,
    draft_recording,
    drafts,
    eplb,
    expert_maps,
    hosts,
    kernel_configs,
    loading,
    positional,
    recording,
    reload,
    routing,
    verification,
)
from .hook_registry import HookSet


@lru_cache(maxsize=1)
def placement_set() -> HookSet:
    """Return the hooks that place experts, chosen by what the installed SGLang lacks."""
    return HookSet(
        [
            *expert_maps.map_hooks(),
            *loading.load_hooks(),
            *positional.positional_hooks(),
            *drafts.draft_hooks(),
            *cpu.cpu_hooks(),
            *kernel_configs.tuned_hooks(),
            *routing.routing_hooks(),
        ],
        PLACEMENT,
    )


@lru_cache(maxsize=1)
def eplb_set() -> HookSet:
    """Return the hooks of a placement under SGLang's EPLB."""
    return HookSet(eplb.eplb_hooks(), EPLB)


@lru_cache(maxsize=1)
def host_set() -> HookSet:
    """Return the hook of a worker of several hosts."""
    return HookSet(hosts.host_hooks())


@lru_cache(maxsize=1)
def verification_set() -> HookSet:
    """Return the hooks that verify weights when they are loaded, and when SGLang is asked to."""
    return HookSet(verification.verification_hooks(), VERIFICATION)


@lru_cache(maxsize=1)
def reload_set() -> HookSet:
    """Return the hooks round new weights of a server whose experts are placed or verified."""
    return HookSet(reload.reload_hooks(), NEW_WEIGHTS)


@lru_cache(maxsize=1)
def recording_set() -> HookSet:
    """Return the hooks that record the expert load."""
    return HookSet(recording.recording_hooks())


@lru_cache(maxsize=1)
def draft_recording_set() -> HookSet:
    """Return the hooks that record a draft's load.

    They come into force when a draft has experts.
    """
    return HookSet(draft_recording.draft_recording_hooks(), DRAFT_RECORDING)


def patch_sets(settings: Settings) -> list[HookSet]:
    """Choose the patches that the settings call for in a worker, and no others."""
    placed, sets = settings.placement is not None, []
    if placed:
        sets.append(placement_set())
    if placed and settings.rebalancing.moves:
        sets.append(eplb_set())
    if placed and settings.hosts is not None:
        sets.append(host_set())
    if settings.verification.on:
        sets.append(verification_set())
    if placed or settings.verification.on:
        sets.append(reload_set())
    if settings.recording is not None:
        draft_recording_set()  # known by its name from now on
        sets.append(recording_set())
    return sets


def require_fit(settings: Settings) -> None:
    """Refuse an SGLang that differs from what the patches rely on.

    Raises:
        PlacementError: naming every patch that does not fit.
    """
    import sglang

    differences = [d for patches in patch_sets(settings) for d in patches.check()]
    if differences:
        raise PlacementError(
            f"SGLang {sglang.__version__} differs from what this plugin was written for: "
            f"{'; '.join(differences)}. Use a supported version or leave the placement flags out"
        )
