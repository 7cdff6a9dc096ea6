"""Describe checkpoints of Step 3, 3.5 and 3.7: a tensor for all experts of a layer.

There is one for each part.
"""

from __future__ import annotations

from collections.abc import Iterator

from .recipe import BASE, LATER, Recipe, router, three_stacked
from .values import EXPERTS, HIDDEN, LAYERS, WIDTH

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


STEP_MODELS: tuple[Recipe, ...] = (
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
)
