"""Refuse by name, while they are built or loaded, the models that vLLM's EPLB cannot move.

vLLM leaves some of them where they are without a word, and stops at others with an assertion of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...core.errors import PlacementError
from ...core.placement import Placement
from .layers import mixture_of_experts, routed_layers

MEND = "leave --enable-eplb out, the placement then holds for as long as the server runs"

_READ = (
    "num_moe_layers",
    "num_expert_groups",
    "num_logical_experts",
    "num_physical_experts",
    "num_routed_experts",
    "num_redundant_experts",
)
"""Attributes of a model that EPLB reads, some of them (the groups) at the first rebalance only."""


@contextmanager
def refusing_unsupported(architecture: str) -> Iterator[None]:
    """Name what does not go with EPLB where vLLM stops at it while it builds a model.

    Args:
        architecture: of the model that is built meanwhile.

    Raises:
        PlacementError: for layers that get redundant experts but not EPLB (vLLM's bare assertion),
            and for methods of quantization and models that vLLM itself refuses.
    """
    try:
        yield
    except AssertionError as error:
        if "Redundant experts are only supported with EPLB" not in str(error):
            raise
        raise PlacementError(
            f"{architecture} builds its MoE layers with redundant experts and without EPLB, which "
            f"vLLM does not allow: {MEND}"
        ) from error
    except NotImplementedError as error:
        text = str(error)
        if not text.startswith("EPLB is not supported"):
            raise
        what = text.removeprefix("EPLB is not supported").strip(" .")
        raise PlacementError(
            f"vLLM's EPLB does not move the experts of {architecture} ({what}): {MEND}"
        ) from error


def check_supported(model: Any) -> None:
    """Refuse a model whose experts EPLB does not move.

    vLLM would serve it with its own placement, without a word.

    Raises:
        PlacementError: naming the model.
    """
    layers = routed_layers(model)
    off = [
        name
        for name, layer in layers.items()
        if not layer.moe_config.moe_parallel_config.enable_eplb
    ]
    moved = mixture_of_experts(model)
    lacks = [name for name in _READ if not hasattr(moved, name)] if moved is not None else []
    if moved is None or off or lacks or not layers:
        why = "no MoE model"
        if off:
            why = f"{off[0]} is not registered"
        elif lacks:
            why = f"it has no {lacks[0]}, which EPLB reads"
        raise PlacementError(
            f"vLLM's EPLB does not move the experts of {type(model).__name__} ({why}): {MEND}"
        )


def check_draft_supported(model: Any) -> None:
    """Refuse a draft whose layers wait for EPLB, and which EPLB never registers.

    Its first forward pass would end the engine. A draft whose layers are built without EPLB is
    served as vLLM places it.

    Raises:
        PlacementError: naming the draft.
    """
    layers = routed_layers(model).items()
    waiting = [n for n, layer in layers if layer.moe_config.moe_parallel_config.enable_eplb]
    if waiting and mixture_of_experts(model) is None:
        raise PlacementError(
            f"vLLM's EPLB does not move the experts of the draft {type(model).__name__} "
            f"(no MoE model), and {waiting[0]} cannot do "
            f"without: {MEND}"
        )


def check_slots(state: Any, placement: Placement) -> None:
    """Refuse a model that takes no redundant experts, whatever EPLB was told (Gemma 4).

    The plan has slots that it lacks.

    Raises:
        PlacementError: naming the model and both numbers of slots.
    """
    slots = state.physical_to_logical_map.shape[1]
    if slots != placement.num_slots:
        raise PlacementError(
            f"{state.model_name} has {slots} slots per layer under EPLB, the placement has "
            f"{placement.num_slots}: vLLM gives this model no redundant experts; use "
            "--eplb-config.num_redundant_experts 0"
        )
