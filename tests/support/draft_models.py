"""Write tiny drafts for speculative decoding, beside the tiny models of the demonstration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from moe_placement_plugin.lab.demo import tiny_models
from moe_placement_plugin.lab.demo.tiny_models import Size


def write_dense_qwen3(path: Path, seed: int = 7) -> Path:
    """Write a Qwen3 without experts: a draft model of its own.

    It has the vocabulary of the tiny models.
    """
    rng, size = np.random.default_rng(seed), Size(layers=2)
    config = tiny_models.common_config(size) | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 2 * size.expert,
    }

    def mlp(prefix: str, layer: int) -> tiny_models.Tensors:
        return tiny_models.mlp_tensors(rng, f"{prefix}.", size.hidden, 2 * size.expert)

    return tiny_models.write_checkpoint(path, config, tiny_models.model_tensors(rng, size, mlp))


def write_glm4_moe_with_mtp(path: Path, num_experts: int = 32) -> Path:
    """Write the tiny GLM-4-MoE with an MTP layer behind the last, which has its own experts."""
    tiny_models.write_glm4_moe(path, num_experts)
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config, indent=2))
    tensors = load_file(path / "model.safetensors")
    last, layer = (f"model.layers.{config['num_hidden_layers'] - n}." for n in (1, 0))
    rng, hidden = np.random.default_rng(9), config["hidden_size"]
    # A permutation of the last layer's tensors would do the target's work; noise makes it a layer
    # of its own.
    for name in [name for name in tensors if name.startswith(last)]:
        tensor = tensors[name]
        noise = rng.normal(0, 0.02, tensor.shape).astype(tensor.dtype)
        tensors[layer + name.removeprefix(last)] = tensor + noise
    ones = np.ones(hidden, np.float32)
    tensors |= {
        f"{layer}enorm.weight": ones,
        f"{layer}hnorm.weight": ones.copy(),
        f"{layer}eh_proj.weight": tiny_models.random_matrix(rng, hidden, 2 * hidden),
        f"{layer}shared_head.norm.weight": ones.copy(),
        f"{layer}shared_head.head.weight": tensors["lm_head.weight"].copy(),
        f"{layer}embed_tokens.weight": tensors["model.embed_tokens.weight"].copy(),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
