"""Where a model's MoE layers hand out the experts that their routers chose, for a recording."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...core.errors import PlacementError
from .layers import layer_id_of

_ROUTE = "choose a kernel that leaves routing to vLLM, such as --moe-backend triton, or leave --expert-load-record out"


def capture_points(model: Any) -> dict[int, Any]:
    """Layer id -> function that takes the capture callback, for every MoE layer of ``model``, in order.

    Raises:
        PlacementError: when a layer's kernel chooses experts by itself and does not report them.
    """
    from vllm.model_executor.layers.fused_moe.layer import MoERunner
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    points: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoERunner):
            layer_id = layer_id_of(module.layer_name)
            layer_id = module.layer_id if layer_id is None else layer_id
            if layer_id in points:
                raise PlacementError(
                    f"--expert-load-record: {name} is a second MoE in layer {layer_id}: each sees a part of the tokens, and a "
                    "recording has one row a layer; leave the flag out"
                )
            if module.is_monolithic:
                points[layer_id] = _monolithic_point(module)
            elif isinstance(module.router, BaseRouter):
                points[layer_id] = module.router.set_capture_fn
            else:
                raise PlacementError(
                    f"--expert-load-record: {name} routes with {type(module.router).__name__}, which reports no experts: {_ROUTE}"
                )
        elif hasattr(module, "capture_fn") and hasattr(
            module, "layer_id"
        ):  # fused layers of single models
            points[module.layer_id] = partial(setattr, module, "capture_fn")
    if not points and _has_experts(model):
        raise PlacementError(
            f"--expert-load-record: no MoE layer of this model routes through vLLM's router: {_ROUTE}"
        )
    return dict(sorted(points.items()))


def _has_experts(model: Any) -> bool:
    """Whether this process holds MoE layers at all; a pipeline stage may hold none."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    return any(isinstance(module, RoutedExperts) for module in model.modules())


def _monolithic_point(module: Any) -> Any:
    kernel = getattr(module.routed_experts.quant_method, "moe_kernel", None)
    experts: Any = getattr(getattr(kernel, "impl", None), "fused_experts", None)
    supports = getattr(experts, "supports_routing_replay_capture", None)
    if supports is None or not supports():
        raise PlacementError(
            f"--expert-load-record: {module.layer_name} runs {type(experts or module.routed_experts.quant_method).__name__}, which "
            f"chooses experts by itself and does not report them: {_ROUTE}"
        )
    if hasattr(experts, "set_capture_fn"):  # vLLM 0.28 to 0.31
        return experts.set_capture_fn

    def set_sink(capture):
        from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsSink

        module.routed_experts.routing_sink = RoutedExpertsSink(experts.moe_config, capture)

    return set_sink
