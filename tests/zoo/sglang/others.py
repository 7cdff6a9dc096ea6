"""Checkpoints of all other families."""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import (
    ALL,
    BASE,
    BIAS,
    GROUPED,
    GROUPED_BAILING,
    LATER,
    MLP,
    PER_EXPERT,
    QWEN3,
    SHARED_AND_BIAS,
    Recipe,
    dense,
    each_expert,
    router,
    stacked,
    three_stacked,
)
from .values import EXPERTS, HIDDEN, LAYERS, WIDTH

BAILING = {
    "model_type": "bailing_moe",
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": False,
    "first_k_dense_replace": 1,
    "embedding_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "moe_shared_expert_intermediate_size": WIDTH,
    "rotary_dim": 16,
}
STEP = {
    "moe_num_experts": EXPERTS,
    "moe_top_k": 2,
    "num_attention_groups": 2,
    "share_expert_dim": WIDTH,
    "share_expert_dims": WIDTH,
    "norm_expert_weight": True,
    "share_q_dim": 32,
    "max_seq_len": 2048,
    "moe_layers_enum": "1,2",
    "rope_scaling": None,
}
STEP35 = STEP | {
    "model_type": "step3p5",
    "need_fp32_gate": True,
    "moe_router_scaling_factor": 1.5,
    "use_moe_router_bias": True,
    "swiglu_limits": [0.0] * 3,
    "swiglu_limits_shared": [0.0] * 3,
    "layer_types": ["full_attention"] * 3,
    "use_head_wise_attn_gate": False,
    "rope_theta": [10000.0] * 3,
    "partial_rotary_factors": [1.0] * 3,
}


def _step_rest() -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for part, rows in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", HIDDEN)):
            yield f"{prefix}.self_attn.{part}.weight", (rows, HIDDEN)
        for norm, size in (("q_norm", 16), ("k_norm", 16)):
            yield f"{prefix}.self_attn.{norm}.weight", (size,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (HIDDEN,)
        path, width = ("share_expert", WIDTH) if layer else ("mlp", 2 * WIDTH)
        yield f"{prefix}.{path}.gate_proj.weight", (width, HIDDEN)
        yield f"{prefix}.{path}.up_proj.weight", (width, HIDDEN)
        yield f"{prefix}.{path}.down_proj.weight", (HIDDEN, width)
    for name, shape in (
        ("model.embed_tokens", (256, HIDDEN)),
        ("lm_head", (256, HIDDEN)),
        ("model.norm", (HIDDEN,)),
    ):
        yield f"{name}.weight", shape


MINIMAX = {
    "num_local_experts": EXPERTS,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "rotary_dim": 16,
    "use_qk_norm": True,
    "intermediate_size": WIDTH,
    "num_mtp_modules": 0,
}
MIMO = GROUPED | {
    "model_type": "mimo_v2_flash",
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": [0, 1, 1],
    "hybrid_layer_pattern": [0, 1, 0],
    "swa_num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window_size": 128,
    "sliding_window": 128,
    "layernorm_epsilon": 1e-6,
    "encoder_only": False,
    "rope_scaling": None,
    "add_swa_attention_sink_bias": False,
    "add_full_attention_sink_bias": False,
    "swa_rope_theta": 10000.0,
    "scale_emb": 1.0,
}
MINIMAX3 = {
    "model_type": "minimax_m3",
    "n_shared_experts": 1,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "qk_norm_type": "per_head",
    "dense_intermediate_size": 2 * WIDTH,
    "moe_layer_freq": [0, 1, 1],
    "routed_scaling_factor": 2.0,
}
NO_REDUNDANCY = {"replicas": "the model asserts that there are none"}

OTHERS: tuple[Recipe, ...] = (
    Recipe(
        "BailingMoEForCausalLM",
        BASE | BAILING,
        LATER,
        MLP,
        (*PER_EXPERT, dense("shared_experts")),
        remote=True,
        refused=NO_REDUNDANCY,
    ),
    Recipe(
        "BailingMoeForCausalLM",
        BASE | BAILING,
        LATER,
        MLP,
        (*PER_EXPERT, dense("shared_experts")),
        remote=True,
        refused=NO_REDUNDANCY,
    ),
    Recipe(
        "BailingMoeV2ForCausalLM",
        BASE | BAILING | GROUPED_BAILING | {"model_type": "bailing_moe_v2"},
        LATER,
        MLP,
        (each_expert(), router(bias="gate.expert_bias"), dense("shared_experts")),
        remote=True,
        refused=NO_REDUNDANCY,
    ),
    Recipe(
        "ExaoneMoEForCausalLM",
        BASE
        | {
            "model_type": "exaone_moe",
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": 128,
            "sliding_window_pattern": None,
            "is_moe_layer": [False, True, True],
            "first_k_dense_replace": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "original_max_position_embeddings": 2048,
        },
        LATER,
        MLP,
        (each_expert(), router(bias="e_score_correction_bias"), dense("shared_experts")),
        remote=True,
    ),
    Recipe(
        "Glm4MoeForCausalLM",
        BASE
        | GROUPED
        | {
            "model_type": "glm4_moe",
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "num_nextn_predict_layers": 0,
        },
        LATER,
        MLP,
        SHARED_AND_BIAS,
    ),
    Recipe(
        "GptOssForCausalLM",
        BASE
        | {
            "model_type": "gpt_oss",
            "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "swiglu_limit": 7.0,
            "rope_scaling": None,
        },
        ALL,
        MLP,
        (
            stacked(transposed=True, interleaved=True, biases=True),
            router("router.weight", "router.bias"),
        ),
        biases=True,
        engine={"attention_backend": "triton"},
    ),
    Recipe(
        "LLaDA2MoeModelLM",
        BASE | BAILING | GROUPED_BAILING | {"model_type": "llada2_moe"},
        LATER,
        MLP,
        (each_expert(), router(bias="gate.expert_bias"), dense("shared_experts")),
        remote=True,
        refused=NO_REDUNDANCY,
    ),
    Recipe(
        "MiMoV2FlashForCausalLM",
        BASE | MIMO,
        LATER,
        MLP,
        (each_expert(), router(bias=BIAS)),
        remote=True,
    ),
    Recipe(
        "MiMoV2ForCausalLM",
        BASE | MIMO | {"model_type": "mimo_v2"},
        LATER,
        MLP,
        (each_expert(), router(bias=BIAS)),
        remote=True,
    ),
    Recipe(
        "MiniMaxM2ForCausalLM",
        BASE | MINIMAX | {"model_type": "minimax_m2", "qk_norm_type": "per_layer"},
        ALL,
        "model.layers.{layer}.block_sparse_moe",
        (each_expert("w1", "w3", "w2"), router(bias="e_score_correction_bias")),
    ),
    Recipe(
        "MiniMaxM3SparseForCausalLM",
        BASE | MINIMAX | MINIMAX3,
        LATER,
        "model.layers.{layer}.block_sparse_moe",
        (
            each_expert("w1", "w3", "w2"),
            router(bias="e_score_correction_bias"),
            dense("shared_experts"),
        ),
        remote=True,
    ),
    Recipe(
        "SarvamMoEForCausalLM",
        BASE | GROUPED_BAILING | BAILING | {"model_type": "sarvam_moe", "num_shared_experts": 1},
        LATER,
        MLP,
        (each_expert(), router(bias="gate.expert_bias"), dense("shared_experts")),
        remote=True,
    ),
    Recipe(
        "Step3VLForConditionalGeneration",
        {
            "model_type": "step3_vl",
            "text_config": BASE | STEP | {"model_type": "step3_text"},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "output_hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        LATER,
        "model.layers.{layer}.moe",
        (three_stacked(), router()),
    ),
    Recipe(
        "Step3p5ForCausalLM",
        BASE | STEP35,
        LATER,
        "model.layers.{layer}.moe",
        (three_stacked(), router(bias="router_bias")),
        rest=tuple(_step_rest()),
    ),
    Recipe(
        "Step3p7ForConditionalGeneration",
        {
            "model_type": "step3p7",
            "text_config": BASE | STEP35,
            "vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 28},
        },
        LATER,
        "model.layers.{layer}.moe",
        (three_stacked(), router(bias="router_bias")),
        rest=tuple(_step_rest()),
    ),
    Recipe(
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "model_type": "minimax_m3_vl",
            "text_config": BASE | MINIMAX | MINIMAX3,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        LATER,
        "language_model.model.layers.{layer}.block_sparse_moe",
        (
            each_expert("w1", "w3", "w2"),
            router(bias="e_score_correction_bias"),
            dense("shared_experts"),
        ),
        remote=True,
    ),
    Recipe(
        "K2HorizonForCausalLM",
        BASE
        | QWEN3
        | {
            "model_type": "k2_horizon",
            "num_shared_experts": 1,
            "moe_gate_bias": True,
            "mova_num_experts": 0,
            "mova_num_experts_per_tok": 0,
            "mlp_only_layers": [0],
            "router_score_func": "sigmoid",
            "router_scaling_factor": 1.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        LATER,
        MLP,
        (each_expert(), router(bias="gate.bias"), dense("shared_experts")),
        engine={"dtype": "bfloat16"},
    ),
    Recipe(
        "XllmForCausalLM",
        BASE
        | QWEN3
        | {
            "model_type": "xllm",
            "num_shared_experts": 1,
            "moe_gate_bias": True,
            "num_values": 0,
            "router_score_func": "sigmoid",
            "router_scaling_factor": 1.5,
            "num_dense_layers": 1,
        },
        LATER,
        MLP,
        (each_expert(), router(bias="gate.bias"), dense("shared_experts")),
        engine={"dtype": "bfloat16"},
    ),
)
