"""Say which expert each slot of a draft's MoE layer holds.

The layer has a row of its own, since SGLang's map of experts is the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from ...core.placement import Placement

ATTRIBUTE = "_moe_placement_draft"
"""Attribute of a draft's ``FusedMoE``: its `DraftLayer`."""

_ROUTING = "_moe_placement_draft_routing"
"""Attribute of the TopK config that routes for it: its `DraftRouting`."""


@dataclass(frozen=True, eq=False)
class DraftLayer:
    """Hold where the experts of one MoE layer of a draft lie.

    Attributes:
        number: of the layer in the draft's own numbering; None where its name does not tell.
        experts: int32 ``[slots]``, logical expert of each slot, rank after rank. A slot that only
            fills its rank up repeats an expert, so that no kernel ever reads memory that nothing
            has filled; tokens go to an expert's first slot.
        num_logical: logical experts.
        num_ranks: EP ranks.
    """

    number: int | None
    experts: np.ndarray
    num_logical: int
    num_ranks: int

    @cached_property
    def first_slot(self) -> np.ndarray:
        """Return the slot that tokens of each expert go to, as int64 ``[experts + 1]``.

        The last entry is -1, for id -1, a padded token's, as index.
        """
        _, first = np.unique(self.experts, return_index=True)
        return np.append(first, -1).astype(np.int64)

    @property
    def in_order(self) -> bool:
        """Tell whether logical ids are slots: SGLang's own order."""
        return bool((self.first_slot[:-1] == np.arange(self.num_logical)).all())

    def slots_of(self, expert: int) -> list[int]:
        """Return all slots that hold an expert.

        Raises:
            PlacementError: when the draft has no such expert.
        """
        if not 0 <= expert < self.num_logical:
            raise PlacementError(
                f"layer {self.number} of the draft: the checkpoint brings expert {expert}, the "
                f"draft's config names {self.num_logical}: this draft is not understood; serve it "
                "without the placement flags"
            )
        return np.flatnonzero(self.experts == expert).tolist()

    def of_rank(self, rank: int) -> np.ndarray:
        """Return the logical expert of each slot, as int32 ``[slots of the rank]``."""
        size = self.experts.size // self.num_ranks
        return self.experts[rank * size : (rank + 1) * size]

    def local_slots(self, rank: int) -> np.ndarray:
        """Return the rank's slot that tokens of each expert go to, as int32 ``[experts + 1]``.

        It is -1 elsewhere and for id -1.
        """
        size = self.experts.size // self.num_ranks
        here = (self.first_slot >= 0) & (self.first_slot // size == rank)
        return np.where(here, self.first_slot - rank * size, -1).astype(np.int32)


@dataclass(frozen=True)
class DraftRouting:
    """Say how a draft's TopK layer sends tokens.

    Attributes:
        info: SGLang's ``ExpertLocationDispatchInfo``; None where logical ids are slots.
    """

    info: Any


def of_layer(layer: Any) -> DraftLayer | None:
    """Return the row of a draft's ``FusedMoE``; None of the target's."""
    return getattr(layer, ATTRIBUTE, None)


def of_router(topk_config: Any) -> DraftRouting | None:
    """Return how a draft's TopK layer sends tokens; None of the target's."""
    return getattr(topk_config, _ROUTING, None)


def routes(topk_config: Any, routing: DraftRouting) -> None:
    """Make a draft's TopK layer send tokens so."""
    object.__setattr__(topk_config, _ROUTING, routing)


def lay_out(placement: Placement, row: int, number: int | None, slots: int) -> DraftLayer:
    """Lay out a row of a placement, whose ranks may be unequal, in SGLang's equal ranks.

    Args:
        placement: one slot per expert.
        row: of the placement.
        number: of the layer.
        slots: of all ranks.
    """
    size = slots // placement.num_ranks
    ranks = [placement.local_experts(row, rank).tolist() for rank in range(placement.num_ranks)]
    filled = [held + [(held or [0])[0]] * (size - len(held)) for held in ranks]
    experts = np.array(filled, dtype=np.int32).ravel()
    return DraftLayer(number, experts, placement.num_logical_experts, placement.num_ranks)


def in_order(experts: int, ranks: int, number: int | None, slots: int) -> DraftLayer:
    """Lay out SGLang's own order: expert e in slot e.

    The slots behind the experts repeat the first of their rank.
    """
    row = np.arange(slots, dtype=np.int32)
    first = row - row % (slots // ranks)
    row = np.where(row < experts, row, np.where(first < experts, first, 0)).astype(np.int32)
    return DraftLayer(number, row, experts, ranks)


def load(
    original: Callable,
    layer: Any,
    param: Any,
    loaded_weight: Any,
    weight_name: str,
    shard_id: str,
    expert_id: int,
) -> None:
    """Run `FusedMoE.weight_loader` of one expert: by the draft's own row in a draft's layer.

    Raises:
        PlacementError: when the draft has no such expert.
    """
    own = of_layer(layer)
    if own is None:
        original(layer, param, loaded_weight, weight_name, shard_id, expert_id)
        return
    slots = own.slots_of(expert_id)
    if getattr(param, "_sglang_require_global_experts", False):
        slots = [expert_id]  # a row for every expert of the model, on every rank
    for slot in slots:
        layer._weight_loader_physical(
            param=param,
            loaded_weight=loaded_weight,
            weight_name=weight_name,
            shard_id=shard_id,
            expert_id=slot,
        )


def dispatch_info(own: DraftLayer, device: Any) -> Any:
    """Return SGLang's ``ExpertLocationDispatchInfo`` of a draft's layer.

    Each expert has one slot that tokens go to.

    Args:
        own: its row.
        device: where the model runs.
    """
    from dataclasses import fields

    import torch
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    to_slot = torch.from_numpy(own.first_slot).to(device)
    values = {
        "ep_dispatch_algorithm": "static",
        "partial_logical_to_rank_dispatch_physical_map": to_slot,
        "partial_logical_to_all_physical_map": to_slot[:-1, None],
        "partial_logical_to_all_physical_map_num_valid": torch.ones_like(to_slot[:-1]),
        "num_physical_experts": own.experts.size,
        "rank_invariant": True,  # from 0.5.17 on
    }
    known = {field.name for field in fields(ExpertLocationDispatchInfo)}
    return ExpertLocationDispatchInfo(**{k: v for k, v in values.items() if k in known})
