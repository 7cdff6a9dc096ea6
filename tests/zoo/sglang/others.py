"""Describe the checkpoints of all other families."""

from __future__ import annotations

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
)
from .values import EXPERTS, WIDTH

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
GPT_OSS = BASE | {
    "model_type": "gpt_oss",
    "num_local_experts": EXPERTS,
    "intermediate_size": WIDTH,
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "swiglu_limit": 7.0,
    "rope_scaling": None,
}
NO_REDUNDANCY = {"replicas": "the model asserts that there are none"}

OTHERS: tuple[Recipe, ...] = (
    *(
        Recipe(
            name,
            BASE | BAILING,
            LATER,
            MLP,
            (*PER_EXPERT, dense("shared_experts")),
            remote=True,
            refused=NO_REDUNDANCY,
        )
        for name in ("BailingMoEForCausalLM", "BailingMoeForCausalLM")
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
        GPT_OSS,
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
        refused=NO_REDUNDANCY,
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
        unbuildable="'dict' object has no attribute 'model_type'",
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
        refused={"all": "SGLang's own model refuses every placement but the trivial one"},
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
        refused={"all": "SGLang's own model refuses every placement but the trivial one"},
    ),
)
