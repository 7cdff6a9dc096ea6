"""Lend SGLang's CPU engine an attention back end with which it serves gpt-oss. Only tests load it.

SGLang refuses gpt-oss with its only attention back end for CPUs without AMX: ``GptOssForCausalLM
requires one of ['triton', ...] attention backend, but got ... torch_native``, which knows no sinks.
`install` puts a torch-native one with sinks in the place of ``triton``; what the experts do is the
engine's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.support.sglang_plugin import install_plugin


def install(folder: Path) -> str:
    """Have SGLang load this module; return the PYTHONPATH with which it does."""
    return install_plugin(folder, "moe_placement_gpt_oss", "tests.integration.sglang.gpt_oss")


def register() -> None:
    """Put the back end in its place; SGLang calls this in every process."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.utils import common

    attention_registry.ATTENTION_BACKENDS["triton"] = _native_with_sinks
    # By the back end's name SGLang would write its tables of tokens with Triton kernels, which a
    # CPU cannot run.
    named = common.support_triton
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("support_triton") is named:
            module.support_triton = _no_triton


def _no_triton(backend: str) -> bool:
    return False


def _native_with_sinks(runner: Any) -> Any:
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    def weigh(output: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        # A stand-in for what a sink does, which is to take its share of the attention.
        if sinks is None:
            return output
        heads = output.view(output.shape[0], sinks.numel(), -1)
        return (heads * torch.sigmoid(-sinks)[:, None].to(output.dtype)).reshape(output.shape)

    class NativeWithSinks(TorchNativeAttnBackend):
        def forward_extend(self, *args: Any, sinks: Any = None, **kwargs: Any) -> torch.Tensor:
            return weigh(super().forward_extend(*args, **kwargs), sinks)

        def forward_decode(self, *args: Any, sinks: Any = None, **kwargs: Any) -> torch.Tensor:
            return weigh(super().forward_decode(*args, **kwargs), sinks)

    return NativeWithSinks(runner)
