"""Let EPLB run on vLLM's CPU build, which refuses it: what its CUDA parts do, in torch.

For machines without a GPU: to try a rebalancing server, and to test one. The exchange is vLLM's
own, over gloo.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

from ..common.patching import Patch
from .layers import mixture_of_experts

logger = logging.getLogger("vllm.moe_placement_plugin")

_KNUTH = 2654435769  # of vLLM's kernel: floor(2^32 / golden ratio)

_ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router"


class _CudaAlike:
    """Stand in for vLLM's platform, but as one on which EPLB may run."""

    def __init__(self, platform: Any):
        self._platform = platform

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


class _WithEvents:
    """Stand in for torch, with events that take their time from the clock, as a CPU has none."""

    def __init__(self, torch: Any):
        self._torch = torch
        self.Event = Event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


class Event:
    """Stand for ``torch.Event`` where work is finished when its call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.at = 0.0

    def record(self, *args: Any) -> None:
        """Note the time."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, other: Event) -> float:
        """Return the milliseconds from this event to ``other``."""
        return (other.at - self.at) * 1e3


def map_and_record(
    topk_ids: Any,
    expert_load_view: Any,
    logical_to_physical_map: Any,
    logical_replica_count: Any,
    record_enabled: Any,
    num_unpadded_tokens: Any = None,
) -> Any:
    """Return the physical experts of the chosen logical ones, and count them.

    vLLM's ``eplb_map_to_physical_and_record`` in torch. Replicas are dealt by a hash of the token's
    row, as vLLM's kernel does, so that every rank chooses alike.

    Args:
        topk_ids: logical experts, ``[tokens, top_k]``; -1 for none, which stays -1 and is not
            counted.
        expert_load_view: int32 ``[physical experts]``, increased by the tokens of each.
        logical_to_physical_map: ``[logical experts, slots]``, -1 behind the last replica.
        logical_replica_count: ``[logical experts]``.
        record_enabled: scalar bool.
        num_unpadded_tokens: scalar; later rows are padding and are not counted.

    Returns:
        Physical experts, as ``topk_ids``.
    """
    import torch

    tokens = torch.arange(topk_ids.shape[0], device=topk_ids.device, dtype=torch.int64)
    hashed = (tokens * _KNUTH) & 0xFFFFFFFF
    logical = topk_ids.long().clamp_min(0)
    replica = hashed[:, None] % logical_replica_count[logical].clamp_min(1)
    physical = logical_to_physical_map[logical, replica].masked_fill(topk_ids < 0, -1)
    real = tokens < (topk_ids.shape[0] if num_unpadded_tokens is None else num_unpadded_tokens)
    counted = physical.clamp_min(0).flatten()
    amount = (
        ((physical >= 0) & real[:, None] & record_enabled.bool())
        .flatten()
        .to(expert_load_view.dtype)
    )
    expert_load_view.scatter_add_(0, counted, amount)
    return physical.to(topk_ids.dtype)


def _load_model(original):
    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if not self.parallel_config.enable_eplb:
            return
        from vllm.distributed.eplb.eplb_state import EplbState

        self._moe_model = mixture_of_experts(self.model)
        self.eplb_state = EplbState(self.parallel_config, self.device)
        if self._moe_model is not None:
            self.eplb_state.add_model(self._moe_model, self.model_config)

    return load_model


PLATFORM = Patch(
    "cpu-eplb-platform",
    "vllm.config.parallel:current_platform",
    _CudaAlike,
    why="vLLM refuses EPLB on everything but CUDA, ROCm and XPU",
    removable_when="vLLM's CPU build supports EPLB",
)


def allow_eplb_on_cpu(engine_args: Any) -> None:
    """Let vLLM's own checks pass on a machine without a GPU, and choose the mode that runs there.

    Args:
        engine_args: an ``EngineArgs`` with ``enable_eplb``; its ``eplb_config`` becomes
            synchronous, over gloo.
    """
    PLATFORM.apply()
    config = copy.copy(engine_args.eplb_config)
    if config.use_async:
        logger.warning(
            "moe_placement_plugin: EPLB rebalances synchronously on a CPU: its async mode needs a "
            "GPU's streams"
        )
    # With CPU tensors this communicator sends over the group's own back end, which is gloo.
    config.use_async, config.communicator = False, "torch_nccl"
    engine_args.eplb_config = config


def cpu_eplb_patches() -> list[Patch]:
    """Return the patches that let a worker of the CPU build run EPLB."""
    return [
        Patch(
            "cpu-eplb-routing",
            f"{_ROUTER}:eplb_map_to_physical_and_record",
            lambda original: map_and_record,
            relies_on=(
                "topk_ids",
                "expert_load_view",
                "logical_to_physical_map",
                "logical_replica_count",
                "record_enabled",
                "num_unpadded_tokens",
            ),
            why="without CUDA vLLM routes to logical ids as if they were physical ones, and counts "
            "nothing",
            removable_when="vLLM's CPU build supports EPLB",
        ),
        Patch(
            "cpu-eplb-register",
            "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
            _load_model,
            why="the CPU runner never registers the model with EPLB",
            removable_when="vLLM's CPU build supports EPLB",
        ),
        Patch(
            "cpu-eplb-events",
            "vllm.distributed.eplb.eplb_state:torch",
            _WithEvents,
            why="torch has no events for the CPU",
            removable_when="vLLM's CPU build supports EPLB",
        ),
    ]
