"""Serve ``--expert-placement-verify`` in a worker, while the model loads and serves."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import PlacementError
from ...core.placement import Placement
from ...verification.compare import ExpertDigests, expert_digests
from ..common.patching import VERIFICATION
from . import compat, elastic, evidence
from .hook_registry import Hook, require_applied
from .slot_digests import digest_ranks, recheck, verify_loaded
from .state import STATE, verifies

ACTION = "expert_placement"
"""What to ask SGLang's weight checker for, to have the experts of a serving server checked."""


@dataclass
class TargetLoading:
    """Hold the target model's loading that is under way in this process.

    Attributes:
        runner: SGLang's ``ModelRunner``.
        level: how far its weights are verified.
        clean: digest of every expert as a clean load has it, once that was made.
    """

    runner: Any
    level: str
    clean: ExpertDigests | None = None


def _load_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    if not verifies() or getattr(self, "is_draft_worker", False):
        return original(self, *args, **kwargs)
    require_applied(VERIFICATION)
    assert STATE.settings is not None, "it says that weights are verified"
    here = STATE.target = TargetLoading(self, STATE.settings.verification.level)
    try:
        result = original(self, *args, **kwargs)
    finally:
        STATE.target = None
    if here.level == "checkpoint" and here.clean is None:
        raise PlacementError(
            "--expert-placement-verify checkpoint: this model is loaded by "
            f"{type(self.loader).__name__}, which cannot be asked for a clean load; use replicas"
        )
    verify_loaded(self.model, here.clean)
    return result


def _load_weights(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.model_loader.loader import DefaultModelLoader

    # Each hook looks for all: none can be lost unseen.
    require_applied(VERIFICATION)
    here = STATE.target
    wanted = here is not None and here.level == "checkpoint" and here.clean is None
    if here is not None and wanted and type(self) is DefaultModelLoader:
        here.clean = clean_load(functools.partial(original, self, *args, **kwargs), here.runner)
    return original(self, *args, **kwargs)


def clean_load(build: Callable[[], Any], runner: Any) -> ExpertDigests:
    """Load the model with SGLang's own trivial placement, digest its experts, and drop it again.

    It has the same number of slots. The model that is to be served is not in memory yet, so that
    the peak is that of one model.

    Args:
        build: loads the model.
        runner: SGLang's ``ModelRunner``.

    Returns:
        The digest of every expert.
    """
    import torch
    from sglang.srt.eplb import expert_location

    in_force, settings = expert_location.get_global_expert_location_metadata(), STATE.settings
    if in_force is not None:
        trivial = _trivial(runner)
        expert_location.set_global_expert_location_metadata(trivial, allow_overwrite=True)
        placement = None if settings is None else settings.placement
        if settings is not None and placement is not None and placement.plan is not None:
            # Layers are built and fused tensors are read by the settings' placement.
            own = replace(placement, plan=_as_placement(trivial, placement.plan))
            STATE.settings = replace(settings, placement=own)
    try:
        model = build()
        found = expert_digests(digest_ranks(model)[1])
    finally:
        expert_location.set_global_expert_location_metadata(in_force, allow_overwrite=True)
        STATE.settings = settings
        evidence.forget()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _trivial(runner: Any) -> Any:
    from sglang.srt.distributed.parallel_state import get_moe_ep_group
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    make = ExpertLocationMetadata.init_trivial
    more = {"server_args": runner.server_args} if compat.takes_server_args(make) else {}
    return make(
        model_config=runner.model_config, moe_ep_rank=get_moe_ep_group().rank_in_group, **more
    )


def _as_placement(metadata: Any, like: Placement) -> Placement:
    rows = metadata.physical_to_logical_map_cpu.numpy()[list(like.layer_ids)]
    return Placement(rows, like.num_logical_experts, like.slots_per_rank, like.layer_ids)


def _check_weights(original: Callable, self: Any, action: str, *args: Any, **kwargs: Any) -> Any:
    if action != ACTION:
        return original(self, action, *args, **kwargs)
    if not getattr(self, "is_draft_worker", False):
        recheck(self.model, alone=elastic.may_lose_ranks())
    return None


def verification_hooks() -> list[Hook]:
    """Return the hooks of a worker process that verifies."""
    runner = "sglang.srt.model_executor.model_runner:ModelRunner"
    return [
        Hook(
            name="verify-load",
            target=f"{runner}.load_model",
            hook=_load_model,
            relies_on=("self",),
            why="what lies in each slot is compared over all ranks before the first request",
            upstream="SGLang #39580, #32962, #18213",
            removable_when="never: it is this plugin's own check",
        ),
        Hook(
            name="verify-clean",
            target="sglang.srt.model_loader.loader:DefaultModelLoader.load_model",
            hook=_load_weights,
            relies_on=("model_config", "device_config"),
            why="level checkpoint loads the model once more with SGLang's own placement, in the "
            "place where SGLang loads it",
            removable_when="never: it is this plugin's own check",
        ),
        Hook(
            name="verify-again",
            target=f"{runner}.check_weights",
            hook=_check_weights,
            relies_on=("action",),
            why="POST /weights_checker knows no action that compares experts with those that were "
            "loaded",
            removable_when="never: it is this plugin's own check",
        ),
    ]
