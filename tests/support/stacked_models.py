"""Tiny checkpoints of models that keep all experts of a layer in one tensor and copy rows of it by
position: gpt-oss and Llama 4.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_placement_plugin.lab.demo.tiny_models import (
    Size,
    Tensors,
    _common,
    _matrix,
    _tensors,
    _write,
)

GPT_OSS = Size(hidden=64, expert=64, layers=2, heads=4, kv_heads=2, head_dim=32)


def write_gpt_oss(
    path: Path,
    num_experts: int = 8,
    seed: int = 0,
    mxfp4: bool = False,
    size: Size = GPT_OSS,
) -> Path:
    """A gpt-oss checkpoint: ``gate_up_proj`` [experts, H, 2 I] and ``down_proj`` [experts, I, H]
    with biases, sinks, yarn.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        seed: of the random weights.
        mxfp4: experts as blocks of 16 bytes (32 values of 4 bits) and a scale of 8 bits each.
        size: width of the model.
    """
    rng = np.random.default_rng(seed)

    def mlp(prefix: str, layer: int) -> Tensors:
        router = {
            f"{prefix}.router.weight": _matrix(rng, num_experts, size.hidden, 2.0),
            f"{prefix}.router.bias": rng.normal(0, 0.1, num_experts).astype(np.float32),
        }
        gate_up = (num_experts, 2 * size.expert, size.hidden)
        down = (num_experts, size.hidden, size.expert)
        experts = {
            f"{prefix}.experts.gate_up_proj_bias": rng.normal(0, 0.5, gate_up[:2]),
            f"{prefix}.experts.down_proj_bias": rng.normal(0, 0.5, down[:2]),
        }
        for name, (count, rows, columns) in (("gate_up", gate_up), ("down", down)):
            stem = f"{prefix}.experts.{name}_proj"
            if mxfp4:
                blocks = (count, rows, columns // 32, 16)
                experts[f"{stem}_blocks"] = rng.integers(0, 256, blocks, dtype=np.uint8)
                experts[f"{stem}_scales"] = rng.integers(120, 126, blocks[:3], dtype=np.uint8)
            else:
                experts[stem] = rng.normal(0, 1.5 / np.sqrt(columns), (count, columns, rows))
        return router | {
            k: v if v.dtype == np.uint8 else v.astype(np.float32) for k, v in experts.items()
        }

    tensors = {
        k: v
        for k, v in _tensors(rng, size, mlp).items()
        if "_norm.weight" not in k or "input" in k or "post" in k
    }
    for layer in range(size.layers):
        attention = f"model.layers.{layer}.self_attn"
        tensors[f"{attention}.sinks"] = rng.normal(0, 1, size.heads).astype(np.float32)
        for name in "qkvo":
            rows = tensors[f"{attention}.{name}_proj.weight"].shape[0]
            tensors[f"{attention}.{name}_proj.bias"] = np.zeros(rows, np.float32)
    config = _common(size) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "intermediate_size": size.expert,
        "layer_types": ["full_attention"] * size.layers,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "initial_context_length": 4096,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }
    if mxfp4:
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        }
    return _write(path, config, tensors)


def write_llama4(path: Path, num_experts: int = 8, seed: int = 0) -> Path:
    """A Llama 4 checkpoint (text only): ``gate_up_proj`` [experts, H, 2 I], ``down_proj`` [experts,
    I, H], a shared expert, one expert a token.
    """
    size, rng = (
        Size(hidden=64, expert=64, layers=2, heads=4, kv_heads=2, head_dim=32),
        np.random.default_rng(seed),
    )

    def mlp(prefix: str, layer: int) -> Tensors:
        prefix = prefix.removesuffix("mlp") + "feed_forward"
        shared = {
            f"{prefix}.shared_expert.{name}_proj.weight": _matrix(rng, rows, columns, 1.5)
            for name, rows, columns in (
                ("gate", size.expert, size.hidden),
                ("up", size.expert, size.hidden),
                ("down", size.hidden, size.expert),
            )
        }
        return shared | {
            f"{prefix}.router.weight": _matrix(rng, num_experts, size.hidden, 2.0),
            f"{prefix}.experts.gate_up_proj": rng.normal(
                0, 0.2, (num_experts, size.hidden, 2 * size.expert)
            ).astype(np.float32),
            f"{prefix}.experts.down_proj": rng.normal(
                0, 0.2, (num_experts, size.expert, size.hidden)
            ).astype(np.float32),
        }

    tensors = {
        k: v for k, v in _tensors(rng, size, mlp).items() if "q_norm" not in k and "k_norm" not in k
    }
    config = _common(size) | {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_local_experts": num_experts,
        "num_experts_per_tok": 1,
        "intermediate_size": size.expert,
        "intermediate_size_mlp": 2 * size.expert,
        "interleave_moe_layer_step": 1,
        "moe_layers": list(range(size.layers)),
        "use_qk_norm": False,
        "no_rope_layers": [1] * size.layers,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": False,
    }
    return _write(path, config, tensors)
