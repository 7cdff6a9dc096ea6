"""Write tiny checkpoints of models that keep all experts of a layer in one tensor.

gpt-oss and Llama 4 copy rows of it by position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_placement_plugin.lab.demo.tiny_models import (
    Size,
    Tensors,
    common_config,
    model_tensors,
    random_matrix,
    write_checkpoint,
)

SMALL = Size(hidden=64, expert=64, layers=2, heads=4, kv_heads=2, head_dim=32)

YARN = {
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
"""Positions as gpt-oss has them."""


def write_gpt_oss(
    path: Path,
    num_experts: int = 8,
    seed: int = 0,
    mxfp4: bool = False,
    size: Size = SMALL,
    yarn: bool = True,
) -> Path:
    """Write a gpt-oss checkpoint, with biases and sinks.

    Experts are ``gate_up_proj [experts, hidden, 2 * width]``, gate and up interleaved, and
    ``down_proj [experts, width, hidden]``.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        seed: of the random weights.
        mxfp4: experts as blocks of 16 bytes (32 values of 4 bits) and a scale of 8 bits each.
        size: width of the model.
        yarn: positions as gpt-oss has them; plain ones without.
    """
    rng = np.random.default_rng(seed)

    def mlp(prefix: str, layer: int) -> Tensors:
        router = {
            f"{prefix}.router.weight": random_matrix(rng, num_experts, size.hidden, 2.0),
            f"{prefix}.router.bias": rng.normal(0, 0.1, num_experts).astype(np.float32),
        }
        return router | _gpt_oss_experts(rng, f"{prefix}.experts", num_experts, size, mxfp4)

    tensors = {
        k: v
        for k, v in model_tensors(rng, size, mlp).items()
        if "_norm.weight" not in k or "input" in k or "post" in k
    }
    for layer in range(size.layers):
        attention = f"model.layers.{layer}.self_attn"
        tensors[f"{attention}.sinks"] = rng.normal(0, 1, size.heads).astype(np.float32)
        for name in "qkvo":
            rows = tensors[f"{attention}.{name}_proj.weight"].shape[0]
            tensors[f"{attention}.{name}_proj.bias"] = np.zeros(rows, np.float32)
    config = _gpt_oss_config(size, num_experts, mxfp4) | (YARN if yarn else {})
    return write_checkpoint(path, config, tensors)


def _gpt_oss_experts(
    rng: np.random.Generator, prefix: str, num_experts: int, size: Size, mxfp4: bool
) -> Tensors:
    """Draw all experts of a layer."""
    gate_up = (num_experts, 2 * size.expert, size.hidden)
    down = (num_experts, size.hidden, size.expert)
    experts = {
        f"{prefix}.gate_up_proj_bias": rng.normal(0, 0.5, gate_up[:2]),
        f"{prefix}.down_proj_bias": rng.normal(0, 0.5, down[:2]),
    }
    for name, (count, rows, columns) in (("gate_up", gate_up), ("down", down)):
        stem = f"{prefix}.{name}_proj"
        if mxfp4:
            blocks = (count, rows, columns // 32, 16)
            experts[f"{stem}_blocks"] = rng.integers(0, 256, blocks, dtype=np.uint8)
            experts[f"{stem}_scales"] = rng.integers(120, 126, blocks[:3], dtype=np.uint8)
        else:
            experts[stem] = rng.normal(0, 1.5 / np.sqrt(columns), (count, columns, rows))
    return {k: v if v.dtype == np.uint8 else v.astype(np.float32) for k, v in experts.items()}


def _gpt_oss_config(size: Size, num_experts: int, mxfp4: bool) -> dict[str, Any]:
    """Return config.json of `write_gpt_oss` without yarn."""
    config = common_config(size) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "experts_per_token": 2,
        "intermediate_size": size.expert,
        "layer_types": ["full_attention"] * size.layers,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "initial_context_length": 4096,
        "router_aux_loss_coef": 0.0,
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
    return config


def write_llama4(path: Path, num_experts: int = 8, seed: int = 0) -> Path:
    """Write a Llama 4 checkpoint (text only), with a shared expert and one expert a token.

    Experts are ``gate_up_proj [experts, hidden, 2 * width]`` and
    ``down_proj [experts, width, hidden]``.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        seed: of the random weights.
    """
    size, rng = SMALL, np.random.default_rng(seed)

    def mlp(prefix: str, layer: int) -> Tensors:
        prefix = prefix.removesuffix("mlp") + "feed_forward"
        gate_up = (num_experts, size.hidden, 2 * size.expert)
        down = (num_experts, size.expert, size.hidden)
        shared = {
            f"{prefix}.shared_expert.{name}_proj.weight": random_matrix(rng, rows, columns, 1.5)
            for name, rows, columns in (
                ("gate", size.expert, size.hidden),
                ("up", size.expert, size.hidden),
                ("down", size.hidden, size.expert),
            )
        }
        return shared | {
            f"{prefix}.router.weight": random_matrix(rng, num_experts, size.hidden, 2.0),
            f"{prefix}.experts.gate_up_proj": rng.normal(0, 0.2, gate_up).astype(np.float32),
            f"{prefix}.experts.down_proj": rng.normal(0, 0.2, down).astype(np.float32),
        }

    tensors = {
        k: v
        for k, v in model_tensors(rng, size, mlp).items()
        if "q_norm" not in k and "k_norm" not in k
    }
    config = common_config(size) | {
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
    return write_checkpoint(path, config, tensors)
