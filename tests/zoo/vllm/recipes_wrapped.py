"""List recipes of classes that see, hear, embed or classify with another class's experts."""

from __future__ import annotations

from typing import Any

from tests.zoo.checkpoint import HIDDEN, WIDTH, Part
from tests.zoo.vllm.recipe import SPARSE, V2_RUNNER, Recipe, config, make, separate, stacked
from tests.zoo.vllm.recipes_more import _LINEAR, INKLING
from tests.zoo.vllm.recipes_text import BAILING, DEEPSEEK, MLA
from tests.zoo.vllm.recipes_vision import _MROPE, _QWEN_EYES, _ROPE, _thinker, _with_text

_SPARSE = "language_model.model.layers.{layer}.block_sparse_moe.experts.{expert}."
_TEXT = "model.language_model.layers.{layer}."

_QWEN = dict(
    num_experts=8, shared_expert_intermediate_size=WIDTH, partial_rotary_factor=0.5, **_LINEAR
)
"""Text of Qwen3.5-MoE and of what is built from it."""

_GEMMA = dict(
    num_experts=8, top_k_experts=2, enable_moe_block=True, sliding_window=32,
    hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0,
    layer_types=["sliding_attention", "full_attention"], global_head_dim=32,
    rope_parameters={"sliding_attention": _ROPE, "full_attention": _ROPE},
)  # fmt: skip
_GEMMA_EYES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=2, head_dim=16, intermediate_size=32)  # fmt: skip

_MINICPM_EYES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip

_MIMO = dict(
    n_routed_experts=8, n_group=1, topk_group=1, norm_topk_prob=True, scoring_func="sigmoid",
    moe_layer_freq=[0, 1], hybrid_layer_pattern=[0, 1], sliding_window=32, sliding_window_size=32,
    swa_head_dim=32, swa_num_attention_heads=2, swa_num_key_value_heads=2, v_head_dim=32,
    swa_v_head_dim=32, layernorm_epsilon=1e-6, swa_rope_theta=10000.0, partial_rotary_factor=1.0,
)  # fmt: skip

_MOONDREAM = {
    "text": dict(dim=HIDDEN, ff_dim=64, n_layers=2, vocab_size=128, max_context=128, n_heads=2,
                 n_kv_heads=2, moe=dict(start_layer=1, n_experts=8, n_experts_per_tok=2,
                                        expert_inner_dim=WIDTH)),
    "vision": dict(enc_dim=32, enc_n_layers=1, enc_ff_dim=32, enc_n_heads=2, proj_inner_dim=32,
                   crop_size=28),
}  # fmt: skip


def _moondream(architecture: str) -> Recipe:
    parts = (
        Part("model.text.blocks.{layer}.mlp.fc1.weight", "w13_weight", (2 * WIDTH, HIDDEN)),
        Part("model.text.blocks.{layer}.mlp.fc2.weight", "w2_weight", (HIDDEN, WIDTH)),
    )
    return make(
        architecture, "moondream3", parts, (1,), own_kind=True, config=_MOONDREAM,
        engine={"language_model_only": True},
    )  # fmt: skip


def _transformers(architecture: str, wrapped: str, prefix: str = "", **own: Any) -> Recipe:
    """Make a model that vLLM builds from transformers' own code for the class ``wrapped``."""
    return make(
        architecture, "qwen3_moe", separate(f"{prefix}layers.{{layer}}.mlp.experts.{{expert}}."),
        architectures=[wrapped], num_experts=8, decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True, engine={"model_impl": "transformers"}, **own,
    )  # fmt: skip


_NO_WEIGHT = "vLLM's CPU linear layers keep no weight for Kimi's attention to take apart"

RECIPES = [
    _with_text("BailingMoeV3VLForConditionalGeneration", "bailing_moe_v3_vl", "bailing_hybrid",
               separate("model.layers.{layer}.mlp.experts.{expert}."), (1,), vision=_QWEN_EYES,
               layer_group_size=2, short_conv_kernel_size=4, no_kda_lora=True,
               engine={"enable_prefix_caching": False},
               whole={"mrope_section": [6, 5, 5]}, **BAILING | MLA),
    make("ClefOmniForJointSchema", "qwen3_omni_moe",
         separate("thinker.model.layers.{layer}.mlp.experts.{expert}."),
         engine={"language_model_only": True}, files=("joint_head.safetensors",),
         joint_head_config=dict(hidden_size=HIDDEN, width=32, routing_layers=1, layers=1, heads=2,
                                feedforward=32),
         **_thinker(config("", "qwen3_omni_moe_text", num_experts=8, decoder_sparse_step=1,
                           mlp_only_layers=[], norm_topk_prob=True, rope_parameters=_MROPE))),
    _with_text("ColQwen3_5", "qwen3_5_moe", "qwen3_5_moe_text",
               stacked("language_model.layers.{layer}.mlp.experts."), vision=_QWEN_EYES,
               whole={"retrieval_attention_contract": "causal"}, **_QWEN),
    _with_text("DiffusionGemmaForBlockDiffusion", "diffusion_gemma", "diffusion_gemma_text",
               stacked("model.decoder.layers.{layer}.experts."), vision=_GEMMA_EYES,
               lacks=V2_RUNNER, **_GEMMA),
    _with_text("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", "gemma4_unified_text",
               stacked(f"{_TEXT}experts."), vision=dict(mm_embed_dim=HIDDEN, mm_posemb_size=16,
                                                       patch_size=4, output_proj_dims=HIDDEN),
               whole={"audio_config": None}, **_GEMMA),
    _with_text("Glm5NextForConditionalGeneration", "glm5_next", "glm5_next_text",
               separate(f"{_TEXT}mlp.experts.{{expert}}."), (1,),
               engine={"enable_prefix_caching": False}, lacks=SPARSE,
               vision=dict(depth=1, hidden_size=32, num_heads=2, out_hidden_size=HIDDEN,
                           intermediate_size=32, projection_intermediate_size=32, image_size=28),
               mhc=True, mla_use_nope=True, indexer_rope_interleave=True, hc_mult=4, hc_eps=1e-6,
               hc_sinkhorn_iters=4, index_topk=16, index_kpool=4,
               layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=4,
               linear_head_dim=32, linear_num_heads=2, mlp_layer_types=["dense", "sparse"],
               swiglu_limit=10.0, **DEEPSEEK | MLA | dict(q_lora_rank=32, qk_rope_head_dim=0)),
    _with_text("InklingForConditionalGeneration", "inkling_mm_model", "inkling_model",
               whole=dict.fromkeys(("hidden_size", "vocab_size", "num_hidden_layers", "head_dim",
                                    "num_attention_heads", "num_key_value_heads")), **INKLING),
    _moondream("HfMoondream"),
    _moondream("Moondream3ForCausalLM"),
    _with_text("InternS2MobiusForConditionalGeneration", "qwen3_5_moe", "qwen3_5_moe_text",
               stacked("model.language_model.meta_mlp.{layer}.experts."), vision=_QWEN_EYES,
               num_hidden_layers=4, num_blocks=2,
               **_QWEN | dict(layer_types=2 * _LINEAR["layer_types"])),
    _with_text("InternS2PreviewForConditionalGeneration", "qwen3_5_moe", "qwen3_5_moe_text",
               stacked(f"{_TEXT}mlp.experts."), vision=_QWEN_EYES, **_QWEN),
    make("JambaForSequenceClassification", "jamba",
         separate("model.layers.{layer}.feed_forward.experts.{expert}."), (1,), num_experts=8,
         num_labels=3, intermediate_size=WIDTH, attn_layer_offset=0, attn_layer_period=2,
         expert_layer_offset=1, expert_layer_period=2, mamba_d_conv=4, mamba_d_state=16,
         mamba_dt_rank=8, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False,
         use_mamba_kernels=False),
    _with_text("KimiK3ForConditionalGeneration", "kimi_k3", "kimi_linear",
               separate(_SPARSE, ("w1", "w3", "w2")), (1,),
               engine={"enable_prefix_caching": False}, loaded_only=_NO_WEIGHT,
               whole={"hidden_size": None, "vocab_size": None},
               vision=dict(vt_num_attention_heads=2, vt_num_hidden_layers=1, vt_hidden_size=32,
                           vt_intermediate_size=32, qkv_hidden_size=32),
               num_experts=8, num_shared_experts=1, first_k_dense_replace=1, moe_layer_freq=1,
               num_experts_per_token=2, moe_renormalize=True, moe_router_activation_func="sigmoid",
               use_grouped_topk=True, num_expert_group=1, topk_group=1, routed_scaling_factor=1.5,
               mla_use_nope=True, linear_attn_config=dict(
                   kda_layers=[1], full_attn_layers=[2], num_heads=2, head_dim=32,
                   short_conv_kernel_size=4), **MLA),
    make("MiMoV2OmniForCausalLM", "mimo_v2_omni", separate(), (1,),
         engine={"language_model_only": True}, vision_config=dict(
             depth=1, hidden_size=32, intermediate_size=32, num_heads=2, num_key_value_heads=2,
             out_hidden_size=HIDDEN, fullatt_block_indexes=[0], vit_window_attn_types=[-1],
             kv_channels=16, qk_channels=16, use_sink=False, spatial_merge_size=2,
             visual_token_window_size=64, in_channels=3, patch_size=16, temporal_patch_size=2,
             hidden_act="silu", window_size=128, tokens_per_second=2),
         **_MIMO),
    make("MiniCPM3ForCausalLM", "minicpm3", separate(names=("w1", "w3", "w2")), num_experts=8,
         scale_emb=1, scale_depth=1.0, dim_model_base=64, intermediate_size=WIDTH, own_kind=True,
         **MLA | dict(q_lora_rank=32)),
    _with_text("MiniCPMV4_6ForConditionalGeneration", "minicpmv4_6", "qwen3_5_moe_text",
               stacked(f"{_TEXT}mlp.experts."), vision=_MINICPM_EYES,
               whole={"insert_layer_id": 0, "image_size": 28}, **_QWEN),
    _with_text("MiniCPMV4_7ForConditionalGeneration", "minicpmv4_7", "qwen3_5_moe_text",
               stacked(f"{_TEXT}mlp.experts."), vision=_MINICPM_EYES,
               whole={"insert_layer_id": 0, "image_size": 28}, **_QWEN),
    _with_text("Qwen4ExpForConditionalGeneration", "qwen4_exp", "qwen4_exp_text",
               stacked(f"{_TEXT}mlp.experts."), vision=_QWEN_EYES, output_gate_type="silu",
               **_QWEN),
    _transformers("TransformersMoEEmbeddingModel", "Qwen3MoeModel"),
    _transformers("TransformersMoEForSequenceClassification", "Qwen3MoeForSequenceClassification",
                  "model.", num_labels=3),
    _with_text("TransformersMultiModalMoEForCausalLM", "qwen3_vl_moe", "qwen3_vl_moe_text",
               stacked(f"{_TEXT}mlp.experts."), vision=_QWEN_EYES, num_experts=8,
               decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
               rope_parameters=_MROPE, engine={"model_impl": "transformers"},
               whole={"architectures": ["Qwen3VLMoeForConditionalGeneration"]}),
]  # fmt: skip
