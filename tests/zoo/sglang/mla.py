"""Describe checkpoints with multi-head latent attention: DeepSeek and what is like it."""

from __future__ import annotations

from .recipe import (
    BASE,
    GROUPED,
    GROUPED_BAILING,
    LATER,
    MLA,
    MLP,
    PER_EXPERT,
    SHARED_AND_BIAS,
    Recipe,
    dense,
    each_expert,
    router,
)
from .values import EXPERTS, HIDDEN, WIDTH

DEEPSEEK_V3 = (
    BASE
    | MLA
    | GROUPED
    | {
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }
)
DSA = "Torch not compiled with CUDA enabled"

MLA_MODELS: tuple[Recipe, ...] = (
    Recipe(
        "Dots3NoteForCausalLM",
        DEEPSEEK_V3
        | {
            "model_type": "dots3_note",
            "language_only": True,
            "layer_types": ["full_attention"] * 3,
            "apply_mla_qkv_lora_rescale": False,
            "n_group": 1,
            "topk_group": 1,
        },
        LATER,
        MLP,
        SHARED_AND_BIAS,
        unbuildable="Dots3 model only supports CUDA backend",
    ),
    Recipe(
        "DeepseekV2ForCausalLM",
        DEEPSEEK_V3
        | {
            "model_type": "deepseek_v2",
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "q_lora_rank": None,
        },
        LATER,
        MLP,
        (*PER_EXPERT, dense("shared_experts", 2 * WIDTH)),
    ),
    Recipe(
        "DeepseekV3ForCausalLM",
        DEEPSEEK_V3 | {"model_type": "deepseek_v3"},
        LATER,
        MLP,
        SHARED_AND_BIAS,
    ),
    Recipe(
        "DeepseekV3ForCausalLM",
        DEEPSEEK_V3 | {"model_type": "deepseek_v3", "moe_layer_freq": 2, "num_hidden_layers": 5},
        (2, 4),
        MLP,
        SHARED_AND_BIAS,
        variant="every-other-layer",
    ),
    Recipe(
        "DeepseekV32ForCausalLM",
        DEEPSEEK_V3
        | {
            "model_type": "deepseek_v32",
            "index_head_dim": 16,
            "index_n_heads": 4,
            "index_topk": 16,
        },
        LATER,
        MLP,
        SHARED_AND_BIAS,
        unbuildable=DSA,
    ),
    Recipe(
        "KimiK25ForConditionalGeneration",
        {
            "model_type": "kimi_k25",
            "text_config": DEEPSEEK_V3
            | {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
            "vision_config": {
                "vt_hidden_size": 32,
                "vt_num_hidden_layers": 1,
                "vt_num_attention_heads": 2,
                "vt_intermediate_size": 32,
                "mm_hidden_size": 32,
                "text_hidden_size": HIDDEN,
            },
        },
        LATER,
        "language_model." + MLP,
        SHARED_AND_BIAS,
    ),
    Recipe(
        "DotsVLMForCausalLM",
        DEEPSEEK_V3
        | {
            "model_type": "dots_vlm",
            "vision_config": {
                "embed_dim": 32,
                "hidden_size": HIDDEN,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
        LATER,
        MLP,
        SHARED_AND_BIAS,
    ),
    Recipe(
        "MistralLarge3ForCausalLM",
        DEEPSEEK_V3 | {"model_type": "deepseek_v3"},
        LATER,
        "layers.{layer}",
        (
            each_expert("w1", "w3", "w2"),
            router(bias="router_biases"),
            dense("shared_experts", names=("w1", "w3", "w2")),
        ),
    ),
    Recipe(
        "Glm4MoeLiteForCausalLM",
        DEEPSEEK_V3 | {"model_type": "glm4_moe_lite"},
        LATER,
        MLP,
        SHARED_AND_BIAS,
    ),
    Recipe(
        "GlmMoeDsaForCausalLM",
        DEEPSEEK_V3
        | {"model_type": "glm_moe_dsa", "index_head_dim": 16, "index_n_heads": 4, "index_topk": 16},
        LATER,
        MLP,
        SHARED_AND_BIAS,
        unbuildable=DSA,
    ),
    Recipe(
        "SarvamMLAForCausalLM",
        BASE
        | MLA
        | GROUPED_BAILING
        | {
            "model_type": "sarvam_mla",
            "num_experts": EXPERTS,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
        },
        LATER,
        MLP,
        SHARED_AND_BIAS,
        remote=True,
    ),
    Recipe(
        "Glm5NextForConditionalGeneration",
        {
            "model_type": "glm5_next",
            "text_config": DEEPSEEK_V3
            | {
                "model_type": "glm5_next_text",
                "swiglu_limit": None,
                "mhc": False,
                "hc_mult": 2,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "linear_conv_kernel_dim": 4,
                "index_head_dim": 16,
                "index_n_heads": 4,
                "index_topk": 16,
                "layer_types": ["full_attention"] * 3,
            },
        },
        LATER,
        "model.language_model.layers.{layer}.mlp",
        SHARED_AND_BIAS,
        unbuildable=DSA,
    ),
)
