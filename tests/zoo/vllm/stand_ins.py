"""Change vLLM for a recipe: what its CPU build lacks, and an error planted in its loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tests.zoo.vllm.recipe import CUDA_EVENTS, SPARSE, V2_RUNNER

_loaded_only = False


def loaded_only() -> bool:
    """Return whether the weights are left as the loader left them."""
    return _loaded_only


@contextmanager
def without_kernels(wanted: bool) -> Iterator[None]:
    """Have vLLM choose kernels as if its CPU had AMX and knew every activation.

    They never see the weights.

    Args:
        wanted: whether the recipe is `Recipe.loaded_only`; nothing changes otherwise.
    """
    global _loaded_only
    from vllm.v1.attention.selector import _cached_get_attn_backend

    _loaded_only = wanted
    try:
        with ExitStack() as all_patches:
            for patch in _any_kernel() if wanted else ():
                all_patches.enter_context(patch)
            if wanted:  # attention with AMX is not for those that follow
                all_patches.callback(_cached_get_attn_backend.cache_clear)
            yield
    finally:
        _loaded_only = False


def _any_kernel() -> list[Any]:
    import torch
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    yes = staticmethod(lambda *args: True)
    return [
        mock.patch.object(torch.cpu, "_is_amx_tile_supported", lambda: True),
        mock.patch.object(CPUUnquantizedExperts, "_supports_activation", yes),
        mock.patch.object(CPUUnquantizedExperts, "_supports_no_act_and_mul", yes),
        mock.patch.object(config, "current_platform", _AnyActivation(config.current_platform)),
    ]


class _AnyActivation:
    """Stand for a platform, and have experts without a gate besides."""

    def __init__(self, platform: Any):
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cuda_alike(self) -> bool:
        return True


@contextmanager
def standing_in(lacks: str) -> Iterator[None]:
    """Have vLLM build a model in spite of what its CPU build lacks.

    No runner and no attention runs in the zoo.

    Args:
        lacks: `Recipe.lacks`; empty changes nothing.
    """
    from vllm.config import vllm as config
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention import selector

    choose = CpuPlatform.get_attn_backend_cls

    def dense(cls, selected_backend, attn_selector_config, **kwargs):
        dense_config = attn_selector_config._replace(use_sparse=False)
        return choose(selected_backend, attn_selector_config=dense_config, **kwargs)

    with ExitStack() as patches:
        if lacks == V2_RUNNER:
            patches.enter_context(mock.patch.object(config, "HAS_TRITON", True))
        if lacks == CUDA_EVENTS:
            patches.enter_context(mock.patch("torch.cuda.Event", mock.Mock))
        if lacks == SPARSE:
            instead = mock.patch.object(CpuPlatform, "get_attn_backend_cls", classmethod(dense))
            patches.enter_context(instead)
            patches.callback(selector._cached_get_attn_backend.cache_clear)
        yield


@contextmanager
def exchanged_experts(wanted: bool) -> Iterator[None]:
    """Have vLLM's loader put expert 0 where expert 2 belongs, and the other way round.

    Args:
        wanted: False changes nothing.
    """
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    to_slot = ExpertMapManager.map_global_to_local
    if wanted:
        ExpertMapManager.map_global_to_local = lambda self, expert: to_slot(
            self, {0: 2, 2: 0}.get(expert, expert)
        )
    try:
        yield
    finally:
        ExpertMapManager.map_global_to_local = to_slot
