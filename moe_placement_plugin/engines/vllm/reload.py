"""New weights for a model that serves (``reload_weights``, weight transfer,
``model.load_weights``): right by the table in force, or refused.

A static placement is obeyed by the loader as it is at the start. Under EPLB a weight goes to the
slots that the table in force gives its expert (`reload_table`), and a rebalance waits until all
ranks have the same weights (`may_rearrange`). What was verified at the start is verified anew once
all weights have come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ...core.errors import PlacementError
from ..common.settings import Settings
from . import eplb_exchange
from .evidence import EVIDENCE, check_evidence, watch
from .layers import EPLB_ROW, EXPECTED, mixture_of_experts, moved_slots, routed_layers

logger = logging.getLogger("vllm.moe_placement_plugin")

_UPDATES = "_moe_placement_updates"
"""Attribute of a model that was loaded and checked: its `Updates`."""


@dataclass
class Updates:
    """The new weights that a model got while it served.

    Attributes:
        count: how often it did; ranks with the same number have the same weights.
        active: whether an update of several calls is under way.
        verified: the number of updates after which digests were last taken.
        viewed: the number of updates after which EPLB's views of the parameters were last looked
            at.
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
        PlacementError: while EPLB moves experts in the background; nothing has been overwritten
            then.
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
    """Refuse new weights while an async rebalance has old ones on their way, which it would write
    over the new.

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
                f"EPLB moves experts of {type(model).__name__} in the background, and would write "
                "old weights over new ones: no weight was "
                "changed; serve a few more requests and update again, or set "
                "--eplb-config.use_async false"
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
    updates = updates_of(model)
    assert updates is not None, "enter_update looked"
    updates.active = True
    for layer in routed_layers(model).values():
        watch(layer, moved_slots(layer), serving=True)


def abandon(model: Any) -> None:
    """An update has failed: its caller knows."""
    if (updates := updates_of(model)) is not None:
        updates.active = False
    for layer in routed_layers(model).values():
        vars(layer).pop(EVIDENCE, None)


def finish(model: Any, settings: Settings, alone: bool) -> None:
    """End an update: every layer got all its experts or none, and what was verified is verified
    anew.

    Args:
        model: the model.
        settings: the engine's settings.
        alone: whether all EP ranks are told to update by one call, so that they can wait for each
            other here.

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


def renew(model: Any, settings: Settings) -> None:
    """Take the digests of the new weights; a collective call of the EP ranks.

    Raises:
        WeightsMismatch: for replicas that differ.
    """
    from .verification import verify_loaded  # lazy: heavy

    updates = updates_of(model)
    assert updates is not None, "only a model that serves has digests to renew"
    updates.verified = updates.count
    if settings.verification.on:
        verify_loaded(model, None, settings)


def may_rearrange(eplb: Any, settings: Settings | None) -> bool:
    """Whether EPLB may move experts now: all EP ranks have got the same updates and none is in the
    middle of one. A collective call.

    Data parallel ranks are told to update one by one. Between the first and the last, an expert
    that moves would bring old weights to a rank that has the new ones.

    Args:
        eplb: vLLM's ``EplbState``.
        settings: the engine's settings.
    """
    import torch
    import torch.distributed as dist

    found_updates = [(s, updates_of(s.model)) for s in eplb.model_states.values()]
    served = [(state, updates) for state, updates in found_updates if updates is not None]
    if not served or not dist.is_initialized():
        return True
    from vllm.distributed.parallel_state import get_ep_group

    group = get_ep_group().cpu_group
    updates = [updates for _, updates in served]
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
    for state, seen in served if unseen else ():
        seen.viewed = seen.count
        eplb_exchange.look_again(eplb, state, group)
    if stale and settings is not None:
        for state, _ in served:
            renew(state.model, settings)
    return True
