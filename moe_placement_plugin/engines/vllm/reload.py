"""New weights for a model that serves (``reload_weights``, weight transfer, ``model.load_weights``): right by the table in force, or refused.

A static placement is obeyed by the loader as it is at the start. Under EPLB a weight goes to the slots that the table in force
gives its expert (`reload_table`), and a rebalance waits until all ranks have the same weights (`may_rearrange`). What was
verified at the start is verified anew once all weights have come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ...errors import PlacementError
from ..patching import Patch
from . import eplb_exchange
from .evidence import EVIDENCE, check_evidence, watch
from .layers import EPLB_ROW, EXPECTED, mixture_of_experts, moved_slots, routed_layers
from .settings import PlacementSettings, settings_of

logger = logging.getLogger("vllm.moe_placement_plugin")

_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_UPDATES = "_moe_placement_updates"
"""Attribute of a model that was loaded and checked: its `Updates`."""


@dataclass
class Updates:
    """The new weights that a model got while it served.

    Attributes:
        count: how often it did; ranks with the same number have the same weights.
        active: whether an update of several calls is under way.
        verified: the number of updates after which digests were last taken.
        viewed: the number of updates after which EPLB's views of the parameters were last looked at.
    """

    count: int = 0
    active: bool = False
    verified: int = 0
    viewed: int = 0


def updates_of(model: Any) -> Updates | None:
    """The updates of a model, None for one that has not been loaded yet."""
    return vars(model).get(_UPDATES)


def serve(model: Any) -> None:
    """The model was loaded and checked: weights that come from now on are new ones."""
    updates = Updates()
    for part in (model, mixture_of_experts(model)):  # EPLB knows the part only
        if part is not None:
            object.__setattr__(part, _UPDATES, updates)


def enter_update(model: Any) -> bool:
    """Before a model takes weights: whether it serves already, and if so whether it may take them.

    Raises:
        PlacementError: while EPLB moves experts in the background; nothing has been overwritten then.
    """
    updates = updates_of(model)
    if updates is None:
        return False
    if not updates.active:
        refuse_while_moving(model)
        updates.count += 1
        forget_digests(model)
    return True


def refuse_while_moving(model: Any) -> None:
    """Refuse new weights while an async rebalance has old ones on their way, which it would write over the new.

    Raises:
        PlacementError: naming the model.
    """
    for layer in routed_layers(model).values():
        at = getattr(layer, EPLB_ROW, None)
        if at is not None and (
            getattr(at[0], "rebalanced", False)
            or getattr(at[0], "pending_result", None) is not None
        ):
            raise PlacementError(
                f"EPLB moves experts of {type(model).__name__} in the background, and would write old weights over new ones: no weight was "
                "changed; serve a few more requests and update again, or set --eplb-config.use_async false"
            )


def forget_digests(model: Any) -> None:
    """Digests are of the weights that are about to go."""
    for layer in routed_layers(model).values():
        if hasattr(layer, EXPECTED):
            object.__delattr__(layer, EXPECTED)


def begin(model: Any) -> None:
    """Begin an update of several calls: all of its weights are noted together.

    Raises:
        PlacementError: as `refuse_while_moving` raises it.
    """
    if not enter_update(model):
        return
    updates_of(model).active = True
    for layer in routed_layers(model).values():
        watch(layer, moved_slots(layer), serving=True)


def abandon(model: Any) -> None:
    """An update has failed: its caller knows."""
    if (updates := updates_of(model)) is not None:
        updates.active = False
    for layer in routed_layers(model).values():
        vars(layer).pop(EVIDENCE, None)


def finish(model: Any, settings: PlacementSettings, alone: bool) -> None:
    """End an update: every layer got all its experts or none, and what was verified is verified anew.

    Args:
        model: the model.
        settings: the engine's settings.
        alone: whether all EP ranks are told to update by one call, so that they can wait for each other here.

    Raises:
        PlacementError: for a layer of which less than all came.
    """
    updates = updates_of(model)
    if updates is None or not updates.active:
        return
    try:
        for layer in routed_layers(model).values():
            if evidence := getattr(layer, EVIDENCE, None):
                evidence.settle(layer)
            check_evidence(layer, whole=False)
    finally:
        abandon(model)
    if alone:
        renew(model, settings)


def renew(model: Any, settings: PlacementSettings) -> None:
    """Take the digests of the new weights; a collective call of the EP ranks.

    Raises:
        WeightsMismatch: for replicas that differ.
    """
    from .verify import verify_loaded

    updates = updates_of(model)
    updates.verified = updates.count
    if settings["verify"] != "off":
        verify_loaded(model, None, settings)


def may_rearrange(eplb: Any, settings: PlacementSettings | None) -> bool:
    """Whether EPLB may move experts now: all EP ranks have got the same updates and none is in the middle of one. A collective call.

    Data parallel ranks are told to update one by one. Between the first and the last, an expert that moves would bring old weights
    to a rank that has the new ones.

    Args:
        eplb: vLLM's ``EplbState``.
        settings: the engine's settings.
    """
    import torch
    import torch.distributed as dist

    states = [s for s in eplb.model_states.values() if updates_of(s.model) is not None]
    if not states or not dist.is_initialized():
        return True
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group().cpu_group
    updates = [updates_of(state.model) for state in states]
    counts = [u.count for u in updates]
    flags = [
        any(u.active for u in updates),
        any(u.verified != u.count for u in updates),
        any(u.viewed != u.count for u in updates),
    ]
    found = torch.tensor([*flags, *counts, *(-c for c in counts)], dtype=torch.int64, device="cpu")
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    active, stale, unseen, *rest = found.tolist()
    highest, lowest = rest[: len(counts)], [-c for c in rest[len(counts) :]]
    if active or highest != lowest:
        logger.warning(
            "moe_placement_plugin: a rebalance is left out: %s",
            "weights are being updated" if active else "only some EP ranks have the new weights",
        )
        return False
    for state in states if unseen else ():
        updates_of(state.model).viewed = updates_of(state.model).count
        eplb_exchange.look_again(eplb, state, group)
    for state in states if stale and settings is not None else ():
        renew(state.model, settings)
    return True


def _model_of(worker: Any) -> Any:
    runner = worker.model_runner
    return runner.get_model() if hasattr(runner, "get_model") else runner.model


def _alone(worker: Any) -> bool:
    return worker.vllm_config.parallel_config.data_parallel_size == 1


def _finish_worker(worker: Any, settings: PlacementSettings) -> None:
    """End an update; after one that left wrong weights the worker computes nothing until one has put them right."""
    try:
        finish(_model_of(worker), settings, _alone(worker))
    except PlacementError as refused:
        reason = str(refused)

        def execute_model(*args, **kwargs):
            raise PlacementError(
                f"the last update of weights went wrong, and no whole one has come since: {reason}"
            )

        worker.execute_model = execute_model
        raise
    vars(worker).pop("execute_model", None)


def _refuse_kernel_format(model: Any, checkpoint_format: Any) -> None:
    if checkpoint_format is False and any(
        moved_slots(layer) or hasattr(layer, EPLB_ROW) for layer in routed_layers(model).values()
    ):
        raise PlacementError(
            "new weights in the kernel's format (is_checkpoint_format=False) are copied by position, past the placement of experts: no "
            "weight was changed; send them in the checkpoint's format (is_checkpoint_format=True)"
        )


def _refuse_stacked_copies(model: Any) -> None:
    """vLLM up to 0.31 loses what a gpt-oss copies into parameters while they are being reloaded, and keeps the old experts."""
    from .stacked import _SPLITS, PICKS

    for module in model.modules():
        if PICKS.get(type(module).__name__) == "block" and not hasattr(module, _SPLITS):
            raise PlacementError(
                f"this version of vLLM does not put new expert weights into a {type(module).__name__} that serves: no weight was changed; "
                "restart the server with the new checkpoint"
            )


def _reload_weights(original):
    def reload_weights(self, *args, **kwargs):
        settings, model = settings_of(self.vllm_config), _model_of(self)
        if settings is None or updates_of(model) is None:
            return original(self, *args, **kwargs)
        _refuse_kernel_format(
            model, args[2] if len(args) > 2 else kwargs.get("is_checkpoint_format")
        )
        _refuse_stacked_copies(model)
        begin(model)
        try:
            result = original(self, *args, **kwargs)
        except BaseException:
            abandon(model)
            raise
        _finish_worker(self, settings)
        return result

    return reload_weights


def _start_weight_update(original):
    def start_weight_update(self, *args, **kwargs):
        settings, model = settings_of(self.vllm_config), _model_of(self)
        if settings is not None:
            _refuse_kernel_format(model, args[0] if args else kwargs.get("is_checkpoint_format"))
            _refuse_stacked_copies(model)
            refuse_while_moving(model)
        result = original(self, *args, **kwargs)
        if settings is not None:
            begin(model)
        return result

    return start_weight_update


def _update_weights(original):
    def update_weights(self, *args, **kwargs):
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            abandon(_model_of(self))
            raise

    return update_weights


def _finish_weight_update(original):
    def finish_weight_update(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if (settings := settings_of(self.vllm_config)) is not None:
            _finish_worker(self, settings)
        return result

    return finish_weight_update


def _sleep(original):
    def sleep(self, level=1, *args, **kwargs):
        settings = settings_of(self.vllm_config)
        if settings is not None and settings["eplb"]:
            if level == 2:
                raise PlacementError(
                    "sleep level 2 with --enable-eplb forgets which expert EPLB has put where: nothing was discarded; sleep at level 1"
                )
            refuse_while_moving(_model_of(self))
        return original(self, level, *args, **kwargs)

    return sleep


def reload_patches() -> list[Patch]:
    """The patches of a server whose weights may be updated."""
    why = "new weights are loaded by EPLB's first table, or by position, and nothing says that they are not verified"
    upstream = "vLLM PR 55228"
    gone = "vLLM loads new weights by the table in force"
    return [
        Patch("reload", f"{_WORKER}.reload_weights", _reload_weights, why, upstream=upstream, removable_when=gone),
        Patch("update-start", f"{_WORKER}.start_weight_update", _start_weight_update, why, upstream=upstream, removable_when=gone,
              optional=True),
        Patch("update", f"{_WORKER}.update_weights", _update_weights, why, upstream=upstream, removable_when=gone, optional=True),
        Patch("update-finish", f"{_WORKER}.finish_weight_update", _finish_weight_update, why, upstream=upstream, removable_when=gone,
              optional=True),
        Patch("sleep", f"{_WORKER}.sleep", _sleep, "sleep level 2 loses EPLB's tables, which are no buffers of the model",
              relies_on=("level",), removable_when="vLLM keeps EPLB's tables while it sleeps"),
    ]  # fmt: skip
