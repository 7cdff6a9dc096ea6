"""``--expert-placement-verify``: the flag's way to the workers, and what happens there while the model loads and serves."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ...core.errors import PlacementError
from ...core.placement import Placement
from ...verification.compare import ExpertDigests, expert_digests
from ...verification.level import HELP, LEVELS, check_level
from . import compat, elastic, evidence, settings
from .hook_registry import Hook, HookSet
from .slot_digests import digest_ranks, recheck, verify_loaded

ATTRIBUTE = "_moe_placement_verify"
FLAG = "expert_placement_verify"

ACTION = "expert_placement"
"""What to ask SGLang's weight checker for, to have the experts of a serving server checked."""

_CLEAN_FORMATS = (
    "auto",
    "safetensors",
    "fastsafetensors",
    "pt",
    "npcache",
    "mistral",
)  # those of DefaultModelLoader

_current: VerifySettings | None = None
_loading: _Loading | None = None


@dataclass
class VerifySettings:
    """How far weights are verified. Rides on ``ServerArgs`` as `settings.Settings` does.

    Attributes:
        level: None until the launcher has settled the default.
    """

    level: str | None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        set_current(self)


@dataclass
class _Loading:
    """The target model's loading that is under way in this process."""

    runner: Any
    level: str
    clean: ExpertDigests | None = None


def set_current(wanted: VerifySettings | None) -> None:
    """Make ``wanted`` that of this process."""
    global _current
    _current = wanted


def current() -> VerifySettings | None:
    """The settings of this process, None when nothing is to be verified."""
    return None if _current is None or _current.level == "off" else _current


def add_arguments(group: Any) -> None:
    """Add the flag to an argparse group."""
    group.add_argument(
        "--expert-placement-verify", type=str, choices=LEVELS, default=None, help=HELP
    )


def request(values: dict[str, Any], placed: bool) -> VerifySettings | None:
    """Take the flag out of ``values`` (arguments of ``ServerArgs``).

    Args:
        values: the arguments.
        placed: whether they ask for a placement too, which is verified by default.

    Raises:
        PlacementError: an unknown level, an unsupported SGLang.
    """
    level = values.pop(FLAG, None)
    if level is not None:
        check_level(level, placed)
    if not placed and level in (None, "off"):
        return None
    import sglang

    compat.check_version(sglang.__version__)
    return VerifySettings(level)


def attach(server_args: Any, wanted: VerifySettings) -> None:
    """Make ``server_args`` carry ``wanted``."""
    setattr(server_args, ATTRIBUTE, wanted)
    set_current(wanted)


def settle(server_args: Any) -> None:
    """Settle the level and refuse what cannot be verified, once SGLang has resolved its arguments and the placement is made.

    Raises:
        PlacementError: naming the reason and the mend.
    """
    wanted: VerifySettings | None = getattr(server_args, ATTRIBUTE, None)
    if wanted is None:
        return
    placed = settings.of(server_args) is not None
    cfg = compat.resolved(server_args)
    load_format = str(getattr(cfg.load_format, "value", cfg.load_format))
    redundant = int(cfg.ep_num_redundant_experts)
    # Every slot of a dummy model is random by itself, replicas too.
    random_replicas = load_format == "dummy" and redundant > 0
    if wanted.level is None and random_replicas:
        wanted.level = "off"
    level = wanted.level = check_level(wanted.level, placed)
    if level == "off":
        return
    flag = f"--expert-placement-verify {level}"
    if not placed:
        _check_experts(server_args, cfg, flag)
    if level == "checkpoint":
        _check_checkpoint(cfg, flag, load_format)
    if random_replicas:
        raise PlacementError(
            f"{flag} with --load-format dummy and {redundant} redundant experts: replicas are random and differ; leave it out"
        )
    if getattr(cfg, "startup_weight_load_mode", None) == "overlap":
        raise PlacementError(
            f"{flag} with --startup-weight-load-mode overlap: nothing is loaded yet when it is verified; leave the mode out"
        )
    hooks().require_fit()


def _check_experts(server_args: Any, cfg: Any, flag: str) -> None:
    from ...core.model_shape import model_shape  # lazy: heavy

    if int(cfg.ep_size) < 2:
        raise PlacementError(
            f"{flag} with --ep-size {cfg.ep_size}: no rank holds whole experts that another could hold too; add --ep-size, or leave the flag out"
        )
    model_shape(
        compat.model_config(server_args).hf_text_config, str(cfg.model_path)
    )  # refuses a model without experts
    if getattr(cfg, "elastic_ep_backend", None):
        raise PlacementError(
            f"{flag} together with --elastic-ep-backend: ranks that come and go change the slots; leave one of the two out"
        )


def _check_checkpoint(cfg: Any, flag: str, load_format: str) -> None:
    if load_format == "dummy":
        raise PlacementError(
            f"{flag} with --load-format dummy: there is no checkpoint to compare with; use replicas"
        )
    if load_format not in _CLEAN_FORMATS:
        raise PlacementError(
            f"{flag} with --load-format {load_format}: only {', '.join(_CLEAN_FORMATS)} can be loaded a second time; use replicas"
        )
    for option, given in (
        ("--cpu-offload-gb", getattr(cfg, "cpu_offload_gb", 0) > 0),
        ("--offload-group-size", getattr(cfg, "offload_group_size", -1) > 0),
        ("--enable-memory-saver", getattr(cfg, "enable_memory_saver", False)),
    ):
        if given:
            raise PlacementError(
                f"{flag} together with {option}: it would keep the model of the clean load in memory; use replicas"
            )


def _load_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    global _loading
    wanted = current()
    if wanted is None or getattr(self, "is_draft_worker", False):
        return original(self, *args, **kwargs)
    hooks().require_applied()
    here = _loading = _Loading(self, str(wanted.level))
    try:
        result = original(self, *args, **kwargs)
    finally:
        _loading = None
    if wanted.level == "checkpoint" and here.clean is None:
        raise PlacementError(
            f"--expert-placement-verify checkpoint: this model is loaded by {type(self.loader).__name__}, which cannot be asked for a clean "
            "load; use replicas"
        )
    verify_loaded(self.model, here.clean)
    return result


def _load_weights(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.model_loader.loader import DefaultModelLoader

    # Each hook looks for all: none can be lost unseen.
    hooks().require_applied()
    if (
        _loading is not None
        and _loading.level == "checkpoint"
        and _loading.clean is None
        and type(self) is DefaultModelLoader
    ):
        _loading.clean = clean_load(
            functools.partial(original, self, *args, **kwargs), _loading.runner
        )
    return original(self, *args, **kwargs)


def clean_load(build: Callable[[], Any], runner: Any) -> ExpertDigests:
    """Load the model with SGLang's own trivial placement in the same number of slots, digest its experts, and drop it again.

    The model that is to be served is not in memory yet, so that the peak is that of one model.

    Args:
        build: loads the model.
        runner: SGLang's ``ModelRunner``.

    Returns:
        The digest of every expert.
    """
    import torch
    from sglang.srt.eplb import expert_location

    in_force, asked = expert_location.get_global_expert_location_metadata(), settings.current()
    if in_force is not None:
        trivial = _trivial(runner)
        expert_location.set_global_expert_location_metadata(trivial, allow_overwrite=True)
        if asked is not None and asked.placement is not None:
            # Layers are built and fused tensors are read by the settings' placement.
            settings.set_current(replace(asked, placement=_as_placement(trivial, asked.placement)))
    try:
        model = build()
        found = expert_digests(digest_ranks(model)[1])
    finally:
        expert_location.set_global_expert_location_metadata(in_force, allow_overwrite=True)
        settings.set_current(asked)
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


@lru_cache(maxsize=1)
def hooks() -> HookSet:
    """The hooks of a worker process that verifies; the same object in every call."""
    runner = "sglang.srt.model_executor.model_runner:ModelRunner"
    return HookSet(
        [
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
                why="level checkpoint loads the model once more with SGLang's own placement, in the place where SGLang loads it",
                removable_when="never: it is this plugin's own check",
            ),
            Hook(
                name="verify-again",
                target=f"{runner}.check_weights",
                hook=_check_weights,
                relies_on=("action",),
                why="POST /weights_checker knows no action that compares experts with those that were loaded",
                removable_when="never: it is this plugin's own check",
            ),
        ]
    )
