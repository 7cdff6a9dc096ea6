"""Lend SGLang's CPU engine what it lacks for speculative decoding. Only tests load it.

Without AMX, SGLang 0.5.20's CPU engine ends with ``EAGLE is not supported in decode attention
backend torch_native``, and its kernels for a tree of draft tokens are compiled ones that PyPI has
no build of. `register` puts a torch-native back end in the place of ``intel_amx`` and gives the
kernels for chains (``speculative_eagle_topk`` 1); drafts, experts and what is accepted are the
engine's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tests.support.sglang_plugin import install_plugin

if TYPE_CHECKING:
    from moe_placement_plugin.lab.demo import tiny_models

ARGUMENTS = {
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


def install(folder: Path) -> str:
    """Have SGLang load this module; return the PYTHONPATH with which it does."""
    return install_plugin(
        folder, "moe_placement_speculative", "tests.integration.sglang.speculative"
    )


def register() -> None:
    """Put back end and kernels in their places; SGLang calls this in every process."""
    import sgl_kernel
    from sglang.srt.layers.attention import attention_registry

    attention_registry.ATTENTION_BACKENDS["torch_native"] = _chain_attention
    for name, kernel in KERNELS.items():
        missing = getattr(sgl_kernel, name)
        setattr(sgl_kernel, name, kernel)
        for module in list(sys.modules.values()):
            for attribute, value in list(getattr(module, "__dict__", {}).items()):
                if value is missing:
                    setattr(module, attribute, kernel)
    if os.environ.get("DRAFT_FAULT") == "routing":
        from moe_placement_plugin.engines.sglang import drafts

        drafts._route = lambda layer, router, own: None
    if "sglang.srt.managers.scheduler" in sys.modules:
        from sglang.srt.speculative.draft_utils import DraftBackendFactory

        DraftBackendFactory.create_decode_backend = _draft_steps
        DraftBackendFactory.create_draft_extend_backend = _draft_extend


def _chain_attention(runner: Any, step: int = 0) -> Any:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class ChainAttention(TorchNativeAttnBackend):
        """Add draft tokens to torch-native attention.

        Several per request that are verified, or one behind the other drafts.
        """

        def forward_extend(
            self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *more: Any, **named: Any
        ) -> Any:
            if batch.forward_mode.is_target_verify():
                size = q.shape[0] // batch.batch_size
                batch = _seen(batch, batch.seq_lens + size)
                batch.extend_prefix_lens = batch.seq_lens - size
                batch.extend_seq_lens = batch.seq_lens.new_full(batch.seq_lens.shape, size)
            return super().forward_extend(q, k, v, layer, batch, *more, **named)

        def forward_decode(
            self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *more: Any, **named: Any
        ) -> Any:
            if step:
                batch = _seen(batch, batch.seq_lens + step)
            return super().forward_decode(q, k, v, layer, batch, *more, **named)

    return ChainAttention(runner)


def _seen(batch: Any, lengths: Any) -> SimpleNamespace:
    """Return what attention looks at, with other lengths."""
    names = ("out_cache_loc", "encoder_out_cache_loc", "req_pool_indices", "encoder_lens")
    return SimpleNamespace(seq_lens=lengths, **{name: getattr(batch, name, None) for name in names})


def _draft_steps(self: Any) -> Any:
    backends = [
        _chain_attention(self.draft_model_runner, step + 1)
        for step in range(self.speculative_num_steps - 1)
    ]
    return SimpleNamespace(attn_backends=backends, init_forward_metadata=lambda batch: None)


def _draft_extend(self: Any) -> Any:
    backend = _chain_attention(self.draft_model_runner)
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = "torch_native"
    return backend


def _build_chain(
    parents,
    selected,
    lengths,
    mask,
    positions,
    index,
    following,
    sibling,
    topk,
    depth,
    tokens,
    mode,
) -> None:
    import torch

    assert topk == 1, "chains only"
    steps = torch.arange(tokens)
    positions.copy_((lengths[:, None] + steps).flatten())
    index.copy_(torch.arange(len(lengths))[:, None] * tokens + steps)
    following[:, :-1] = steps[1:]


def _verify_chain(
    predicts, accept_index, accept_token_num, candidates, target_predict, retrive_index, **rest
) -> None:
    for row, (drafted, right) in enumerate(zip(candidates.tolist(), target_predict.tolist())):
        places, accepted = retrive_index[row].tolist(), 0
        while accepted + 1 < len(drafted) and drafted[accepted + 1] == right[accepted]:
            accepted += 1
        for place in range(accepted + 1):
            accept_index[row, place] = places[place]
            predicts[places[place]] = right[place]
        accept_token_num[row] = accepted


def _draft_places(requests, table, lengths, places, width, topk, steps) -> None:
    rows = places.view(len(requests), topk * steps)
    for row, request, length in zip(rows, requests.tolist(), lengths.tolist()):
        row.copy_(table[request, length : length + topk * steps])


def _extend_places(requests, table, begins, ends, places, width) -> None:
    at = 0
    for request, begin, end in zip(requests.tolist(), begins.tolist(), ends.tolist()):
        places[at : at + end - begin] = table[request, begin:end].to(places.dtype)
        at += end - begin


def _give_places(requests, table, begins, ends, places, width) -> None:
    at = 0
    for request, begin, end in zip(requests.tolist(), begins.tolist(), ends.tolist()):
        table[request, begin:end] = places[at : at + end - begin].to(table.dtype)
        at += end - begin


def _bonus_tokens(accepted, lengths, bonus, width) -> None:
    rows = accepted.view(len(lengths), width)
    bonus.copy_(rows.gather(1, (lengths.long() - 1)[:, None])[:, 0])


def _copy_in_place(pointers, strides, to, source) -> None:
    assert (to == source).all(), "what a chain accepts lies where it should"


KERNELS = {
    "build_tree_kernel_efficient_cpu": _build_chain,
    "verify_tree_greedy_cpu": _verify_chain,
    "assign_draft_cache_locs_contiguous_cpu": _draft_places,
    "assign_extend_cache_locs_cpu": _extend_places,
    "copy_all_layer_kv_cache_cpu": _copy_in_place,
    "assign_req_to_token_pool_cpu": _give_places,
    "fill_bonus_tokens_cpu": _bonus_tokens,
}
"""Name in ``sgl_kernel`` -> the same for chains."""


def write_qwen2_moe(
    path: Path,
    num_experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    size: tiny_models.Size | None = None,
) -> Path:
    """Write a Qwen2-MoE checkpoint, which SGLang takes for a draft as it is.

    As a draft of Qwen3-MoE it would load an MTP layer.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        top_k: experts per token.
        seed: of the random weights.
        size: of the model; two layers of narrow heads when left out.
    """
    import numpy as np

    from moe_placement_plugin.lab.demo.tiny_models import (
        Size,
        expert_tensors,
        model_tensors,
        qwen3_moe_config,
        router_tensors,
        write_checkpoint,
    )

    size, rng = size or Size(layers=2, head_dim=8), np.random.default_rng(seed)
    config = qwen3_moe_config(size, num_experts, top_k) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 0,  # its gate is a Triton kernel
    }

    def mlp(prefix: str, layer: int) -> dict[str, np.ndarray]:
        return router_tensors(rng, prefix, num_experts, size) | expert_tensors(
            rng, prefix, num_experts, size
        )

    tensors = {
        n: t
        for n, t in model_tensors(rng, size, mlp).items()
        if "_norm.weight" not in n or "self_attn" not in n
    }
    for layer in range(size.layers):
        for part, heads in (("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.bias"
            tensors[name] = np.zeros(heads * size.head_dim, np.float32)
    return write_checkpoint(path, config, tensors)
