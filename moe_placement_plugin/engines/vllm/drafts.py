"""The draft of speculative decoding: a model of its own, or MTP layers beside the target, loaded after it through the same code.

A static strategy places the draft's MoE layers too, and a plan may hold rows for them under ``draft``. The draft numbers its layers
by itself, so that its layer 3 is not the target's: which of the two is being built must be known, and is known here only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ...core.errors import PlacementError
from ...core.model_shape import ModelShape
from ..common.drafts import draft_layer_id
from ..common.settings import Settings

_loading: ContextVar[bool] = ContextVar("moe_placement_loading_draft", default=False)


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether a model that is about to be loaded is the draft.

    A draft that is a model of its own comes with a config in which it stands in the target's place (``method: draft_model``), so that
    comparing with the config's own model is not enough. Methods without a model (ngram, suffix) name the target as their draft.

    Args:
        vllm_config: the ``VllmConfig`` that the loader was given.
        model_config: the ``ModelConfig`` of what is to be loaded.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is None or model_config is not speculative.draft_model_config:
        return False
    return model_config is not speculative.target_model_config


@contextmanager
def loading(draft: bool) -> Iterator[None]:
    """While a model is built and its weights come in: whether it is the draft."""
    token = _loading.set(draft)
    try:
        yield
    finally:
        _loading.reset(token)


def loading_draft() -> bool:
    """Whether the model that this process builds or loads is the draft."""
    return _loading.get()


def draft_shape(vllm_config: Any) -> ModelShape | None:
    """The experts of the draft that the engine is started with; None without a draft that has some.

    Which of its layers are MoE layers is known once it was built, and checked then.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    config = getattr(speculative, "draft_model_config", None)
    if config is None or not is_draft(vllm_config, config):
        return None
    experts = int(config.get_num_experts() or 0)
    return ModelShape((), experts, name=config.model) if experts else None


def check_draft(layers: dict[str, Any], settings: Settings) -> None:
    """Refuse a draft that is not the one that the plan has rows for; a plan without such rows leaves the draft to the strategy.

    Args:
        layers: name -> ``RoutedExperts`` of the draft that was loaded.
        settings: the engine's.

    Raises:
        PlacementError: naming the layers.
    """
    plan = None if settings.plan is None else settings.plan.draft
    if plan is None:
        return
    found = {name: draft_layer_id(name) for name in layers}
    for name, number in found.items():
        manager = layers[name].expert_map_manager
        if number not in plan.layer_ids:
            raise PlacementError(
                f"{name} of the draft is not among the plan's rows for the draft (layers {list(plan.layer_ids)}): number "
                "them as the draft's own names do, or leave the draft's rows out"
            )
        if (manager.ep_size, manager.global_num_experts) != (
            plan.num_ranks,
            plan.num_logical_experts,
        ):
            raise PlacementError(
                f"{name} of the draft has {manager.global_num_experts} experts on {manager.ep_size} EP ranks, the plan's rows "
                f"for the draft are for {plan.num_logical_experts} on {plan.num_ranks}: plan for this draft, or leave its rows out"
            )
    missing = sorted(set(plan.layer_ids) - set(found.values()))
    if missing:
        raise PlacementError(
            f"the plan has a row for layer {missing[0]} of the draft, whose MoE layers are {sorted(map(str, found.values()))}: "
            "plan for this draft, or leave its rows out"
        )


def refuse_own_kind(model: Any, experts: int) -> None:
    """Refuse a draft that keeps its experts in a kind of layer of its own (MiniCPM's), which no expert map reaches.

    They are told by a matrix for each expert, since the config of a dense draft counts the experts of its target too.

    Args:
        model: a draft without a ``RoutedExperts``.
        experts: as the draft's config counts them.

    Raises:
        PlacementError: naming the tensor of the experts.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and parameter.shape[0] == experts and min(parameter.shape[1:]) > 1:
            raise PlacementError(
                f"the draft {type(model).__name__} keeps its {experts} experts in {name}, in no MoE layer of vLLM's own kind, so that "
                "none of them was placed: take a draft without experts, or leave the placement flag out"
            )
