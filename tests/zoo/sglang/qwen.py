"""Describe the checkpoints of the Qwen family and of models on the same modules."""

from __future__ import annotations

from .recipe import ALL, BASE, LATER, MLP, PER_EXPERT, QWEN3, Recipe, dense, router, single, stacked
from .values import HIDDEN, WIDTH

STACKED_AND_SHARED = (
    stacked(),
    router(),
    dense("shared_expert"),
    single("shared_expert_gate.weight", 1, HIDDEN),
)
"""What a MoE layer of Qwen3.5 and its followers holds: experts in one tensor, a shared one."""

QWEN35 = {
    "shared_expert_intermediate_size": WIDTH,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 3,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}

QWEN: tuple[Recipe, ...] = (
    Recipe(
        "InternS1ProForConditionalGeneration",
        {
            "model_type": "interns1_pro",
            "text_config": BASE | QWEN3 | {"model_type": "interns1_pro_text"},
            "vision_config": QWEN_VISION,
        },
        ALL,
        "model.language_model.layers.{layer}.mlp",
        PER_EXPERT,
        unbuildable="__init__() got an unexpected keyword argument 'start_layer'",
        remote=True,
    ),
    Recipe(
        "MellumForCausalLM",
        BASE
        | QWEN3
        | {
            "model_type": "mellum",
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "mlp_only_layers": [0],
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        LATER,
        MLP,
        PER_EXPERT,
    ),
    Recipe(
        "Qwen2MoeForCausalLM",
        BASE | QWEN3 | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 2 * WIDTH},
        ALL,
        MLP,
        (
            *PER_EXPERT,
            dense("shared_expert", 2 * WIDTH),
            single("shared_expert_gate.weight", 1, HIDDEN),
        ),
    ),
    Recipe("Qwen3MoeForCausalLM", BASE | QWEN3 | {"model_type": "qwen3_moe"}, ALL, MLP, PER_EXPERT),
    Recipe(
        "Qwen3MoeForCausalLM",
        BASE | QWEN3 | {"model_type": "qwen3_moe"},
        ALL,
        MLP,
        (stacked(), router()),
        variant="stacked",
        refused={"all": "its weights did not come through FusedMoE's loader"},
    ),
    Recipe(
        "Qwen3MoeForCausalLM",
        BASE
        | QWEN3
        | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "num_hidden_layers": 4},
        (1, 3),
        MLP,
        PER_EXPERT,
        variant="dense-layers",
        refused={"all": "the model's config hides an MoE layer"},
    ),
    Recipe(
        "Qwen3MoeForCausalLM",
        BASE | QWEN3 | {"model_type": "qwen3_moe"},
        ALL,
        MLP,
        PER_EXPERT,
        engine={"model_impl": "transformers"},
        variant="transformers",
        refused={"all": "they route outside SGLang's TopK layer"},
    ),
    Recipe(
        "Qwen3NextForCausalLM",
        BASE
        | QWEN3
        | {
            "model_type": "qwen3_next",
            "shared_expert_intermediate_size": WIDTH,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "full_attention_interval": 3,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "partial_rotary_factor": 0.5,
        },
        ALL,
        MLP,
        (*PER_EXPERT, dense("shared_expert"), single("shared_expert_gate.weight", 1, HIDDEN)),
    ),
    Recipe(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "model_type": "qwen3_vl_moe",
            "text_config": BASE
            | QWEN3
            | {
                "model_type": "qwen3_vl_moe_text",
                "rope_scaling": {
                    "mrope_section": [4, 2, 2],
                    "rope_type": "default",
                    "mrope_interleaved": True,
                },
            },
            "vision_config": QWEN_VISION,
        },
        ALL,
        "model.language_model.layers.{layer}.mlp",
        (stacked(transposed=True), router()),
    ),
    Recipe(
        "SDARMoeForCausalLM",
        BASE | QWEN3 | {"model_type": "sdar_moe"},
        ALL,
        MLP,
        PER_EXPERT,
        remote=True,
    ),
    Recipe(
        "Qwen3_5MoeForCausalLM",
        BASE | QWEN3 | QWEN35 | {"model_type": "qwen3_5_moe_text"},
        ALL,
        MLP,
        STACKED_AND_SHARED,
    ),
    Recipe(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "model_type": "qwen3_5_moe",
            "text_config": BASE | QWEN3 | QWEN35 | {"model_type": "qwen3_5_moe_text"},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": []},
        },
        ALL,
        "model.language_model.layers.{layer}.mlp",
        STACKED_AND_SHARED,
    ),
    Recipe(
        "InternS2PreviewForConditionalGeneration",
        {
            "model_type": "intern_s2_preview",
            "text_config": BASE | QWEN3 | QWEN35 | {"model_type": "qwen3_5_moe_text"},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": []},
        },
        ALL,
        "model.language_model.layers.{layer}.mlp",
        STACKED_AND_SHARED,
    ),
    Recipe(
        "Qwen4ExpForConditionalGeneration",
        {
            "model_type": "qwen4_exp",
            "text_config": BASE
            | QWEN3
            | QWEN35
            | {"model_type": "qwen4_exp_text", "hc_count": 2, "hc_lowrank": 16},
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": []},
        },
        ALL,
        "model.language_model.layers.{layer}.mlp",
        STACKED_AND_SHARED,
        unbuildable="Torch not compiled with CUDA enabled",
    ),
)
