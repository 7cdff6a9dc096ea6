"""Write tiny MoE checkpoints with random weights, in the form that both engines load.

They are big enough to be real (several MoE layers, grouped-query attention, a tokenizer, per-expert
tensors) and small enough to load in a second. Expert weights are drawn so wide that a wrong expert
changes log probabilities clearly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """Say how wide and how deep a tiny model is.

    Attributes:
        hidden: hidden size.
        expert: intermediate size of an expert.
        layers: layers of the model.
        heads: query heads of its attention.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocab: rows of the embedding.
    """

    hidden: int = 64
    expert: int = 64
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 320


def write_qwen3_moe(
    path: str | Path,
    num_experts: int = 30,
    top_k: int = 4,
    seed: int = 0,
    size: Size = Size(),
    weights: bool = True,
) -> Path:
    """Write a Qwen3-MoE checkpoint: softmax router, no groups, every layer an MoE layer.

    Args:
        path: directory to write to.
        num_experts: experts per layer.
        top_k: experts per token.
        seed: of the random weights.
        size: width of the model.
        weights: False for a checkpoint without weights, which engines load with ``--load-format
            dummy``.

    Returns:
        The directory.
    """
    rng = np.random.default_rng(seed)
    config = qwen3_moe_config(size, num_experts, top_k)

    def mlp(prefix: str, layer: int) -> Tensors:
        return router_tensors(rng, prefix, num_experts, size) | expert_tensors(
            rng, prefix, num_experts, size
        )

    return write_checkpoint(path, config, model_tensors(rng, size, mlp) if weights else None)


def write_glm4_moe(
    path: str | Path,
    num_experts: int = 32,
    num_groups: int = 4,
    top_k: int = 4,
    seed: int = 0,
    size: Size = Size(),
) -> Path:
    """Write a GLM-4-MoE checkpoint: sigmoid router with bias, grouped top-k, layer 0 dense.

    It has a correction bias and a shared expert.

    Args:
        path: directory to write to.
        num_experts: routed experts per layer.
        num_groups: expert groups, half of which a token may use.
        top_k: experts per token.
        seed: of the random weights.
        size: width of the model.

    Returns:
        The directory.
    """
    rng = np.random.default_rng(seed)
    config = glm4_moe_config(size, num_experts, num_groups, top_k)

    def mlp(prefix: str, layer: int) -> Tensors:
        if layer == 0:
            return mlp_tensors(rng, f"{prefix}.", size.hidden, 2 * size.expert)
        bias = {
            f"{prefix}.gate.e_score_correction_bias": rng.normal(0, 0.1, num_experts).astype(
                np.float32
            )
        }
        shared = mlp_tensors(rng, f"{prefix}.shared_experts.", size.hidden, size.expert)
        return (
            router_tensors(rng, prefix, num_experts, size)
            | bias
            | shared
            | expert_tensors(rng, prefix, num_experts, size)
        )

    return write_checkpoint(path, config, model_tensors(rng, size, mlp))


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen3-moe": write_qwen3_moe,
    "glm4-moe": write_glm4_moe,
}
"""Name -> writer of the models of the demonstration."""


def qwen3_moe_config(size: Size, num_experts: int, top_k: int) -> dict[str, Any]:
    """Return config.json of `write_qwen3_moe`."""
    return common_config(size) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": size.expert,
        "intermediate_size": 2 * size.expert,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    }


def glm4_moe_config(size: Size, num_experts: int, num_groups: int, top_k: int) -> dict[str, Any]:
    """Return config.json of `write_glm4_moe`."""
    return common_config(size) | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": num_experts,
        "num_experts_per_tok": top_k,
        "n_group": num_groups,
        "topk_group": num_groups // 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": size.expert,
        "intermediate_size": 2 * size.expert,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    }


def common_config(size: Size) -> dict[str, Any]:
    """Return what the config.json of every tiny model holds."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "vocab_size": size.vocab,
    }


def random_matrix(
    rng: np.random.Generator, rows: int, columns: int, gain: float = 1.0
) -> np.ndarray:
    """Draw float32 ``[rows, columns]`` that multiplies a vector's size by about ``gain``."""
    return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)


def router_tensors(rng: np.random.Generator, prefix: str, num_experts: int, size: Size) -> Tensors:
    """Draw a router that loads its experts unevenly."""
    # Experts get different gains, so that the load is skewed as real ones are.
    gains = np.exp(rng.normal(0, 0.5, (num_experts, 1))).astype(np.float32)
    return {f"{prefix}.gate.weight": random_matrix(rng, num_experts, size.hidden, 2.0) * gains}


def mlp_tensors(rng: np.random.Generator, prefix: str, hidden: int, width: int) -> Tensors:
    """Draw gate, up and down projection of a dense MLP or of one expert."""
    return {
        f"{prefix}gate_proj.weight": random_matrix(rng, width, hidden, 1.5),
        f"{prefix}up_proj.weight": random_matrix(rng, width, hidden, 1.5),
        f"{prefix}down_proj.weight": random_matrix(rng, hidden, width, 1.5),
    }


def expert_tensors(rng: np.random.Generator, prefix: str, num_experts: int, size: Size) -> Tensors:
    """Draw all experts of a layer, each in tensors of its own."""
    tensors: Tensors = {}
    for expert in range(num_experts):
        tensors |= mlp_tensors(rng, f"{prefix}.experts.{expert}.", size.hidden, size.expert)
    return tensors


def model_tensors(
    rng: np.random.Generator, size: Size, mlp: Callable[[str, int], Tensors]
) -> Tensors:
    """Draw a whole model.

    Args:
        rng: what they are drawn from.
        size: width and depth.
        mlp: gives the tensors behind a prefix for a layer.
    """
    ones, hidden, heads = np.ones, size.hidden, size.heads
    tensors = {"model.embed_tokens.weight": random_matrix(rng, size.vocab, hidden, 8.0)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        tensors |= {
            f"{attention}.q_proj.weight": random_matrix(rng, heads * size.head_dim, hidden),
            f"{attention}.k_proj.weight": random_matrix(rng, size.kv_heads * size.head_dim, hidden),
            f"{attention}.v_proj.weight": random_matrix(rng, size.kv_heads * size.head_dim, hidden),
            f"{attention}.o_proj.weight": random_matrix(rng, hidden, heads * size.head_dim),
            f"{attention}.q_norm.weight": ones(size.head_dim, np.float32),
            f"{attention}.k_norm.weight": ones(size.head_dim, np.float32),
            f"{prefix}.input_layernorm.weight": ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": ones(hidden, np.float32),
        }
        tensors |= mlp(f"{prefix}.mlp", layer)
    tensors["model.norm.weight"] = ones(hidden, np.float32)
    tensors["lm_head.weight"] = random_matrix(rng, size.vocab, hidden, 2.0)
    return tensors


def write_checkpoint(path: str | Path, config: dict[str, Any], tensors: Tensors | None) -> Path:
    """Write a checkpoint's directory: configuration, tokenizer, and tensors if there are any."""
    from safetensors.numpy import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 256, "eos_token_id": 257})
    )
    if tensors is not None:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """Write a byte-level tokenizer: token i is byte i, then three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The order of GPT-2's byte alphabet does not matter: ids are given by position in this
    # vocabulary.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>", "<pad>")])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
