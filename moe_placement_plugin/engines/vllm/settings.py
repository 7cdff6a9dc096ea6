"""What every process of the engine must know, carried inside ``VllmConfig.additional_config``."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np

from ...core.placement import Placement, even_slots
from ...core.topology import Topology
from ...formats.packed import pack, unpack
from ...strategies import PlacementRequest, get_strategy

KEY = "moe_placement_plugin"
"""Key of ``additional_config``."""


class PlacementSettings(dict):
    """The placement that was resolved at start-up, as JSON-compatible values.

    Being a dict it is hashed by vLLM with the rest of its config. What travels is a `carrier.CarriedSettings`.
    """

    @classmethod
    def make(
        cls,
        strategy: str,
        placement: Placement | None,
        ep_size: int,
        record: dict[str, Any] | None = None,
        exact: bool = False,
        verify: str = "off",
        eplb: bool = False,
        rebalance: dict[str, Any] | None = None,
        verify_asked: bool = False,
        hosts: dict[str, Any] | None = None,
        redundant: int = 0,
        lora: bool = False,
    ) -> PlacementSettings:
        """Settings that hold the whole placement, so that other hosts need no file.

        Args:
            strategy: name of the strategy in force.
            placement: the placement of the model's MoE layers; None leaves the engine's own (``linear``).
            ep_size: number of EP ranks.
            record: what is to be recorded, see `recording.record_settings`; None records nothing.
            exact: the placement comes from a file, so that it must cover the model layer by layer; a strategy
                that needs none can place layers that were not foreseen.
            verify: how far weights are verified, see `verification.level`.
            eplb: vLLM's EPLB moves the experts, beginning with ``placement``.
            verify_asked: the user named the level, so that what cannot be verified is refused.
            rebalance: rules for rebalancing that the user gave, see `rebalancer.policy_from`.
            hosts: how several hosts agree, see `hosts.host_settings`.
            redundant: redundant experts per layer, of all ranks.
            lora: the engine takes LoRA adapters (``--enable-lora``), those of experts among them.
        """
        from ..._version import __version__  # lazy: heavy

        data: dict[str, Any] = {
            "plugin": __version__,
            "strategy": strategy,
            "ep_size": ep_size,
            "plan": None if placement is None else pack(placement),
            "record": record,
            "exact": exact,
            "verify": verify,
            "eplb": eplb,
            "rebalance": rebalance,
            "verify_asked": verify_asked,
            "hosts": hosts,
            "redundant": redundant,
            "lora": lora,
        }
        return cls(data)

    @property
    def strategy(self) -> str:
        """Name of the strategy in force."""
        return self["strategy"]

    @cached_property
    def placement(self) -> Placement | None:
        """The placement of the model's MoE layers, None for the engine's own."""
        plan = self["plan"]
        if plan is None:
            return None
        return unpack(plan)

    def parcel(self) -> dict[str, Any]:
        """What the head sends to the other hosts."""
        return {"plan": self["plan"], "exact": self["exact"]}

    def adopt(self, parcel: dict[str, Any]) -> None:
        """Take the head's placement, in place: everything in this process that holds these settings follows it."""
        self.update(parcel, hosts={**self["hosts"], "adopt": False})
        self.__dict__.pop("placement", None)

    @property
    def static(self) -> Placement | None:
        """The placement that expert maps follow; None where EPLB moves the experts instead, or vLLM's own stands."""
        return None if self["eplb"] else self.placement

    def expert_map(
        self,
        layer_id: int | None,
        num_experts: int,
        ep_size: int,
        ep_rank: int,
        draft: bool = False,
    ) -> np.ndarray:
        """int32 ``[experts]``: local slot of each expert on ``ep_rank``, -1 where it lies elsewhere.

        Layers that the plan does not know (an encoder's; a draft's without rows of its own) are placed by the
        strategy itself, or contiguously when it plans from a load.

        Args:
            layer_id: number of the layer in the model, or in the draft.
            num_experts: its logical experts.
            ep_size: number of EP ranks.
            ep_rank: the rank.
            draft: the layer is the draft's, see `drafts`.
        """
        placement = self.placement
        if draft and placement is not None:
            placement = placement.draft
        if (
            placement is not None
            and layer_id in placement.layer_ids
            and placement.num_logical_experts == num_experts
            and placement.num_ranks == ep_size
        ):
            return placement.expert_map(placement.row(layer_id), ep_rank)
        return self._fallback(num_experts, ep_size).expert_map(0, ep_rank)

    def knows(self, layer_id: int | None, num_experts: int) -> bool:
        """Whether the plan holds this layer."""
        placement = self.placement
        return (
            placement is not None
            and layer_id in placement.layer_ids
            and placement.num_logical_experts == num_experts
        )

    def _fallback(self, num_experts: int, ep_size: int) -> Placement:
        strategy = get_strategy(self.strategy)
        if strategy.needs_load:
            strategy = get_strategy("linear")
        request = PlacementRequest(
            1, num_experts, Topology(ep_size), slots_per_rank=even_slots(num_experts, ep_size)
        )
        return strategy.place(request)


_arrived: PlacementSettings | None = None


def remember(settings: PlacementSettings) -> None:
    """Make these the settings of this process."""
    global _arrived
    _arrived = settings


def arrived() -> PlacementSettings | None:
    """The settings that were made in or sent to this process, for code that vLLM calls outside of any config's context."""
    return _arrived


def settings_of(vllm_config: Any) -> PlacementSettings | None:
    """The settings inside a ``VllmConfig``, None when no placement was asked for."""
    extra = getattr(vllm_config, "additional_config", None)
    found = extra.get(KEY) if isinstance(extra, dict) else None
    return found if isinstance(found, PlacementSettings) else None


def current_settings() -> PlacementSettings | None:
    """The settings of the engine whose model is being built or loaded in this process."""
    from vllm.config import get_current_vllm_config_or_none

    return settings_of(get_current_vllm_config_or_none())


_LAYER = re.compile(
    r"(?:^|\.)(?:layers|blocks|h|meta_mlp)\.(\d+)(?:\.|$)"
)  # meta_mlp: Intern-S2-Mobius
# A draft model numbers its layers from 0 again, or names them differently in checkpoint and module.
_DRAFT = re.compile(r"(?:^|\.)(?:mtp\w*|eagle\w*|draft\w*|nextn\w*)(?:\.|$)")


def layer_id_of(name: str) -> int | None:
    """The layer's index in a module or weight name such as ``model.layers.3.mlp.experts``.

    None when there is no index, more than one, or the name is a draft model's: such a layer cannot be told
    for sure.
    """
    if _DRAFT.search(name):
        return None
    found = _LAYER.findall(name)
    return int(found[0]) if len(found) == 1 else None
