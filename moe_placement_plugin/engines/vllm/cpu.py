"""Make vLLM's CPU kernels, which take an expert map and ignore it, fit for expert parallelism.

The kernels index their local weights with global expert ids: out of bounds on every rank, which
ends in a segmentation fault. Here the ids are mapped to local slots first. A choice that lies on
another rank gets local slot 0 with weight 0; the other rank computes it, and vLLM's all-reduce adds
the two up.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from typing import Any

from ..common.patching import Patch

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts"
_MODULES = (f"{_EXPERTS}.cpu_moe", f"{_EXPERTS}.cpu_int4_moe", f"{_EXPERTS}.zentorch_moe")
_PATCHED = "_moe_placement_honours_expert_map"

_current = threading.local()


def to_local(topk_weights: Any, topk_ids: Any, expert_map: Any) -> tuple[Any, Any]:
    """Return the chosen experts as local slots, those of other ranks at slot 0 with weight 0.

    Args:
        topk_weights: ``[tokens, top_k]``.
        topk_ids: global expert ids, ``[tokens, top_k]``; -1 for none, which is computed nowhere.
        expert_map: int32 ``[experts]``, local slot or -1.

    Returns:
        (weights, local slots) of the same shapes and types.
    """
    local = expert_map[topk_ids.long()]
    away = (local < 0) | (topk_ids < 0)  # index -1 is the last expert
    return topk_weights.masked_fill(away, 0), local.masked_fill(away, 0).to(topk_ids.dtype)


def _modular(original):
    """Patch experts that are handed the chosen ids."""
    signature = inspect.signature(original)

    def apply(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        values = bound.arguments
        if values["expert_map"] is not None:
            weights, ids = to_local(
                values["topk_weights"], values["topk_ids"], values["expert_map"]
            )
            on_input = values.get("apply_router_weight_on_input")
            asked = values["topk_ids"].long()
            away = (values["expert_map"][asked] < 0) | (asked < 0)
            if on_input and away.shape[1] != 1:
                raise NotImplementedError(
                    "expert parallelism on CPU with apply_router_weight_on_input "
                    "and several experts for a token"
                )
            values["topk_weights"], values["topk_ids"] = weights, ids
            result = original(*bound.args, **bound.kwargs)
            if on_input:
                # The weight went into the input, so that weight 0 does not silence the choices of
                # other ranks.
                values["output"].masked_fill_(away, 0)
            return result
        return original(*bound.args, **bound.kwargs)

    return apply


def _monolithic(original):
    """Patch experts that choose by themselves.

    The map waits for their call of ``select_experts``.
    """
    signature = inspect.signature(original)

    def apply(self, *args, **kwargs):
        values = signature.bind(self, *args, **kwargs).arguments
        if values["expert_map"] is not None and values.get("apply_router_weight_on_input"):
            raise NotImplementedError("expert parallelism on CPU with apply_router_weight_on_input")
        before = getattr(_current, "expert_map", None)
        _current.expert_map = values["expert_map"]
        try:
            return original(self, *args, **kwargs)
        finally:
            _current.expert_map = before

    return apply


def _select_experts(original):
    def select_experts(*args, **kwargs):
        weights, ids = original(*args, **kwargs)
        expert_map = getattr(_current, "expert_map", None)
        return (weights, ids) if expert_map is None else to_local(weights, ids, expert_map)

    return select_experts


class CpuExpertsPatch(Patch):
    """Patch one class of CPU experts; remember on the class that it honours expert maps now."""

    def apply(self) -> None:
        super().apply()
        if self.state == "applied":
            setattr(self._owner()[0], _PATCHED, True)

    def undo(self) -> None:
        if self.state == "applied":
            delattr(self._owner()[0], _PATCHED)
        super().undo()


def honours_with_patch(experts: type) -> bool:
    """Tell whether a class of CPU experts honours expert maps thanks to these patches."""
    return bool(getattr(experts, _PATCHED, False))


def cpu_patches() -> list[Patch]:
    """Return the patches of the CPU build.

    There is one for each class of CPU experts in the installed vLLM, and one for the routing of
    monolithic ones.
    """
    patches: list[Patch] = []
    for module_name in _MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        for name, experts in vars(module).items():
            if (
                not inspect.isclass(experts)
                or experts.__module__ != module_name
                or "apply" not in vars(experts)
            ):
                continue
            parameters = inspect.signature(vars(experts)["apply"]).parameters
            if "expert_map" not in parameters:
                continue
            modular = "topk_ids" in parameters
            patches.append(
                CpuExpertsPatch(
                    f"cpu-{module_name.rpartition('.')[2]}-{name}",
                    f"{module_name}:{name}.apply",
                    _modular if modular else _monolithic,
                    relies_on=("expert_map", "topk_ids", "topk_weights")
                    if modular
                    else ("expert_map", "router_logits"),
                    why="the kernel indexes local weights with global expert ids "
                    "and crashes under expert parallelism",
                    removable_when="vLLM's CPU kernels honour expert_map",
                )
            )
    for module_name in (
        f"{_EXPERTS}.cpu_moe",
        "vllm.model_executor.layers.fused_moe.router.cpu_router",
    ):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        if (
            inspect.isfunction(vars(module).get("select_experts"))
            and module.select_experts.__module__ == module_name
        ):
            patches.append(
                Patch(
                    f"cpu-routing-{module_name.rpartition('.')[2]}",
                    f"{module_name}:select_experts",
                    _select_experts,
                    relies_on=("router_logits", "top_k"),
                    why="monolithic CPU experts choose experts by themselves, "
                    "after the map could be applied",
                    removable_when="vLLM's CPU kernels honour expert_map",
                )
            )
    return patches
