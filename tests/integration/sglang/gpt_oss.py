"""A tiny gpt-oss checkpoint, and an attention back end with which SGLang's CPU engine serves it. Only tests load it.

SGLang refuses gpt-oss with its only attention back end for CPUs without AMX: ``GptOssForCausalLM requires one of
['triton', ...] attention backend, but got ... torch_native``, which knows no sinks. `install` puts a torch-native one
with sinks in the place of ``triton``; what the experts do is the engine's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.children import python_path


def write_gpt_oss(path: Path, num_experts: int = 8, top_k: int = 2, seed: int = 0) -> Path:
    """A gpt-oss checkpoint in bf16's layout: all experts of a layer in one tensor, gate and up interleaved, biases.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        top_k: experts per token.
        seed: of the random weights.
    """
    from moe_placement_plugin.lab.demo.tiny_models import Size, _common, _matrix, _write

    size, rng = Size(layers=3), np.random.default_rng(seed)
    config = _common(size) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "experts_per_token": top_k,
        "intermediate_size": size.expert,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "layer_types": ["full_attention"] * size.layers,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "router_aux_loss_coef": 0.0,
    }

    def stack(*shape: int, gain: float) -> np.ndarray:
        return (rng.standard_normal((num_experts, *shape)) * gain).astype(np.float32)

    tensors = {"model.embed_tokens.weight": _matrix(rng, size.vocab, size.hidden, 8.0)}
    for layer in range(size.layers):
        prefix, queries = f"model.layers.{layer}", size.heads * size.head_dim
        attention, experts = f"{prefix}.self_attn", f"{prefix}.mlp.experts"
        for name, rows in (
            ("q", queries),
            *((n, size.kv_heads * size.head_dim) for n in ("k", "v")),
        ):
            tensors[f"{attention}.{name}_proj.weight"] = _matrix(rng, rows, size.hidden)
            tensors[f"{attention}.{name}_proj.bias"] = np.zeros(rows, np.float32)
        tensors |= {
            f"{attention}.o_proj.weight": _matrix(rng, size.hidden, queries),
            f"{attention}.o_proj.bias": np.zeros(size.hidden, np.float32),
            f"{attention}.sinks": rng.standard_normal(size.heads).astype(np.float32),
            f"{prefix}.input_layernorm.weight": np.ones(size.hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(size.hidden, np.float32),
            f"{prefix}.mlp.router.weight": _matrix(rng, num_experts, size.hidden, 2.0),
            f"{prefix}.mlp.router.bias": rng.normal(0, 0.3, num_experts).astype(np.float32),
            f"{experts}.gate_up_proj": stack(size.hidden, 2 * size.expert, gain=0.2),
            f"{experts}.gate_up_proj_bias": stack(2 * size.expert, gain=0.3),
            f"{experts}.down_proj": stack(size.expert, size.hidden, gain=0.2),
            f"{experts}.down_proj_bias": stack(size.hidden, gain=0.3),
        }
    tensors["model.norm.weight"] = np.ones(size.hidden, np.float32)
    tensors["lm_head.weight"] = _matrix(rng, size.vocab, size.hidden, 2.0)
    return _write(path, config, tensors)


def install(folder: Path) -> str:
    """Write the metadata by which SGLang finds this module; returns the PYTHONPATH that makes it do so."""
    info = folder / "moe_placement_gpt_oss-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: moe-placement-gpt-oss\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nmoe_placement_gpt_oss = tests.integration.sglang.gpt_oss:register\n"
    )
    return python_path(folder)


def register() -> None:
    """The entry point."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.utils import common

    attention_registry.ATTENTION_BACKENDS["triton"] = _native_with_sinks
    # By the back end's name SGLang would write its tables of tokens with Triton kernels, which a CPU cannot run.
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
