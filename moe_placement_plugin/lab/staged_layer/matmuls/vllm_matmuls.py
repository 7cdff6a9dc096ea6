"""Call vLLM's ``fused_moe_kernel``, align step, activation and sum.

They are called as ``fused_experts_impl`` calls them.

Read in vLLM 0.25.1, 0.32.0 and 0.33.0; what is called is probed by signature.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from ....core.errors import PlacementError
from .engine import LAUNCH, EngineMatmuls, engine_function

_FUSED_MOE = "vllm.model_executor.layers.fused_moe.fused_moe"
_ASSIGN = (
    "topk_ids",
    "config",
    "num_tokens",
    "top_k_num",
    "global_num_experts",
    "expert_map",
    "ignore_invalid_experts",
)
_TILES = ("w1_shape", "w2_shape", "top_k", "dtype", "M")


class VllmMatmuls(EngineMatmuls):
    """Multiply by the installed vLLM."""

    zeroes_elsewhere = False

    def __init__(self, interpreted: bool):
        super().__init__(interpreted)
        if interpreted:
            _import_with_triton()
        import vllm

        self._launch = engine_function(_FUSED_MOE, "invoke_fused_moe_triton_kernel", LAUNCH)
        if not interpreted:
            self._assign = engine_function(_FUSED_MOE, "_prepare_expert_assignment", _ASSIGN)
            self._tiles = engine_function(_FUSED_MOE, "try_get_optimal_moe_config", _TILES)
            self._sum = engine_function("vllm._custom_ops", "moe_sum", ("input", "output"))
        self.name = f"vLLM {vllm.__version__} fused_moe_kernel" + (
            " (Triton interpreter)" if interpreted else ""
        )
        self._maps: dict[tuple[int, torch.device], torch.Tensor] = {}

    def choose_tiles(self, x, output, weights):
        # The name under which tuned tiles for these types are filed; bfloat16 and float16 share
        # the one without a name.
        dtype = "float32" if x.dtype == torch.float32 else None
        config = self._tiles(
            w1_shape=tuple(weights.w13.shape),
            w2_shape=tuple(weights.w2.shape),
            top_k=output.local_slots.shape[1],
            dtype=dtype,
            M=output.num_rows,
        )
        return config, config

    def align(self, output, config):
        rows, top_k = output.local_slots.shape
        expert_map, experts = None, output.num_slots
        if not output.complete:
            # vLLM's align step takes no -1, but drops what its map sends there: one slot more
            # stands for all others.
            expert_map, experts = self._elsewhere_map(experts, output.buckets.device), experts + 1
        return self._assign(
            topk_ids=output.buckets,
            config=config,
            num_tokens=rows,
            top_k_num=top_k,
            global_num_experts=experts,
            expert_map=expert_map,
            ignore_invalid_experts=True,
        )

    def _elsewhere_map(self, slots: int, device: torch.device) -> torch.Tensor:
        if (slots, device) not in self._maps:
            self._maps[slots, device] = torch.tensor(
                [*range(slots), -1], dtype=torch.int32, device=device
            )
        return self._maps[slots, device]

    def engine_swiglu(self, values):
        result = values.new_empty((values.shape[0], values.shape[1] // 2))
        torch.ops._C.silu_and_mul(result, values)
        return result

    def engine_sum(self, values):
        result = values.new_empty((values.shape[0], values.shape[2]))
        self._sum(values, result)
        return result


def _import_with_triton() -> None:
    """Import vLLM's kernels as Triton's on a machine without a GPU.

    vLLM puts stand-ins in Triton's place unless exactly one of Triton's back ends has an active
    driver, and its CPU build unless one is called cpu as well. The interpreter needs neither.

    Raises:
        PlacementError: when the stand-ins are there already.
    """
    from triton.backends import backends

    if "vllm.triton_utils" not in sys.modules:
        driven = any(backend.driver.is_active() for backend in backends.values())
        shown = {"cpu": False} if driven else {"cpu": False, "interpreter": True}
        shown = {name: active for name, active in shown.items() if name not in backends}
        for name, active in shown.items():
            backends[name] = SimpleNamespace(
                driver=SimpleNamespace(is_active=lambda active=active: active), compiler=None
            )
        try:
            import vllm.triton_utils  # noqa: F401
        finally:
            for name in shown:
                del backends[name]
    if not sys.modules["vllm.triton_utils"].HAS_TRITON:
        raise PlacementError(
            "vLLM was imported without Triton in this process: find its matmuls (find_matmuls) "
            "before anything else imports vLLM"
        )
