"""Find the MoE layers of a model: their experts and their routers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...core.errors import PlacementError


def expert_layers(model: Any) -> dict[str, Any]:
    """Map the name of every MoE layer of this rank to its ``FusedMoE``."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}


def moe_blocks(
    model: Any, prefix: str = "", mend: str = "serve it without the placement flags"
) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, ``FusedMoE`` and ``TopK`` of every MoE block.

    Args:
        model: the loaded model.
        prefix: of the name in errors.
        mend: what the error advises.

    Raises:
        PlacementError: at a block that has not one of each.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    for name, parent in model.named_modules():
        children = list(parent.children())
        experts = [child for child in children if isinstance(child, FusedMoE)]
        if not experts:
            continue
        routers = [child for child in children if isinstance(child, TopK)]
        if len(experts) != 1 or len(routers) != 1:
            raise PlacementError(
                f"{prefix}{name} has {len(experts)} expert layers and {len(routers)} TopK layers, "
                f"expected one of each: this model routes in a way of its own; {mend}"
            )
        yield name, experts[0], routers[0]


def routing_kernel(router: Any) -> str | None:
    """Name the kernel that routes inside itself, by its output or back end.

    It is None where ``TopK`` routes.
    """
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    output = getattr(router.topk_config.output_format, "name", None)
    backend = get_moe_runner_backend()
    if output in ("BYPASSED", "TRITON_KERNEL") or (
        output is None
        and (
            backend.is_triton_kernels()
            or backend.is_flashinfer_trtllm()
            or backend.is_flashinfer_mxfp4()
        )
    ):
        return output or backend.value
    return None


def check_router(name: str, router: Any) -> None:
    """Refuse a block that routes inside its kernel.

    Raises:
        PlacementError: naming the block.
    """
    kernel = routing_kernel(router)
    if kernel is not None:
        raise PlacementError(
            f"{name} routes inside its kernel ({kernel}), which never sees the map of experts: "
            "choose --moe-runner-backend triton or another that the table in docs/sglang.md "
            "lists, or leave the placement flags out"
        )
