"""List recipes of language models, L to Z."""

from __future__ import annotations

from tests.zoo.checkpoint import HIDDEN, WIDTH, Part
from tests.zoo.vllm.recipe import (
    CUDA_EVENTS,
    NO_KERNEL,
    NO_PREFIX_CACHING,
    V2_RUNNER,
    make,
    separate,
    stacked,
)
from tests.zoo.vllm.recipes_text import BAILING, DEEPSEEK, MLA

_W123 = ("w1", "w3", "w2")
_SPARSE = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

_LINEAR = dict(
    linear_conv_kernel_dim=4, linear_key_head_dim=32, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_value_head_dim=32, full_attention_interval=2,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip

_LONGCAT = dict(
    n_routed_experts=8, num_layers=2, num_hidden_layers=None, expert_ffn_hidden_size=WIDTH,
    ffn_hidden_size=64, moe_topk=2, zero_expert_num=2, zero_expert_type="identity",
    routed_scaling_factor=1.5, mla_scale_q_lora=True, mla_scale_kv_lora=True,
    attention_method="MLA", **MLA | dict(q_lora_rank=32),
)  # fmt: skip

_KIMI_MLA = "vLLM's CPU linear layer leaves Kimi's attention no kv_b_proj to split"

_STEP = (
    Part("model.layers.{layer}.moe.gate_proj.weight", "w13_weight", (WIDTH, HIDDEN)),
    Part("model.layers.{layer}.moe.up_proj.weight", "w13_weight", (WIDTH, HIDDEN)),
    Part("model.layers.{layer}.moe.down_proj.weight", "w2_weight", (HIDDEN, WIDTH)),
)

INKLING = dict(
    parts=(
        Part("model.llm.layers.{layer}.mlp.experts.w13_weight", "w13_weight", (2 * WIDTH, HIDDEN)),
        Part("model.llm.layers.{layer}.mlp.experts.w2_weight", "w2_weight", (HIDDEN, WIDTH)),
    ), layers=(1,), lacks=CUDA_EVENTS, engine={"dtype": "bfloat16"}, loaded_only=(
        "the model sums its layers' answers over the ranks outside vLLM's MoE layer"),
    n_routed_experts=8, n_shared_experts=1, shared_expert_sink=True, dense_mlp_idx=1,
    intermediate_size=WIDTH, dense_intermediate_size=64, use_gate_bias=True, use_sconv=True,
    sconv_kernel_size=4, d_rel=16, rel_extent=64, local_layer_ids=[0], sliding_window_size=32,
)  # fmt: skip

_NEMOTRON = dict(
    layers=(1,), loaded_only=NO_KERNEL, parts=(
        Part("backbone.layers.{layer}.mixer.experts.{expert}.up_proj.weight", "w13_weight",
             (WIDTH, HIDDEN)),
        Part("backbone.layers.{layer}.mixer.experts.{expert}.down_proj.weight", "w2_weight",
             (HIDDEN, WIDTH)),
    ), hybrid_override_pattern="*E", n_routed_experts=8, n_shared_experts=1, n_group=1,
    topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0,
    moe_shared_expert_intermediate_size=WIDTH, mlp_hidden_act="relu2", mlp_bias=False,
    layer_norm_epsilon=1e-5, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16,
    conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True, mamba_hidden_act="silu",
    mamba_proj_bias=False,
)  # fmt: skip

RECIPES = [
    make("InklingForCausalLM", "inkling_model", **INKLING),
    make("LongcatFlashForCausalLM", "longcat_flash", separate(), **_LONGCAT),
    make("LongcatFlashNgramForCausalLM", "longcat_flash_ngram", separate(), lacks=V2_RUNNER,
         emb_neighbor_num=3, emb_split_num=1, ngram_vocab_size_ratio=2, **_LONGCAT),
    make("MiMoV2FlashForCausalLM", "mimo_v2_flash", separate(), (1,), n_routed_experts=8,
         n_group=1, topk_group=1, norm_topk_prob=True, scoring_func="sigmoid",
         moe_layer_freq=[0, 1],
         hybrid_layer_pattern=[0, 1], sliding_window=32, sliding_window_size=32, swa_head_dim=32,
         swa_num_attention_heads=2, swa_num_key_value_heads=2, v_head_dim=32, swa_v_head_dim=32,
         layernorm_epsilon=1e-6, swa_rope_theta=10000.0, partial_rotary_factor=1.0),
    make("MiMoV2ForCausalLM", "mimo_v2", separate(), (1,), n_routed_experts=8,
         n_group=1, topk_group=1, norm_topk_prob=True, scoring_func="sigmoid",
         moe_layer_freq=[0, 1],
         hybrid_layer_pattern=[0, 1], sliding_window=32, sliding_window_size=32, swa_head_dim=32,
         swa_num_attention_heads=2, swa_num_key_value_heads=2, v_head_dim=32, swa_v_head_dim=32,
         layernorm_epsilon=1e-6, swa_rope_theta=10000.0, partial_rotary_factor=1.0),
    make("MiniCPMForCausalLM", "minicpm", separate(names=_W123), num_experts=8, scale_emb=1,
         scale_depth=1.0, dim_model_base=64, intermediate_size=WIDTH, own_kind=True,
         ),
    make("MiniMaxM2ForCausalLM", "minimax_m2", separate(_SPARSE, _W123), num_local_experts=8,
         intermediate_size=WIDTH, rotary_dim=16, scoring_func="sigmoid", use_routing_bias=True,
         use_qk_norm=True),
    make("NemotronHForCausalLM", "nemotron_h", **_NEMOTRON),
    make("NemotronHPuzzleForCausalLM", "nemotron_h", **_NEMOTRON),
    make("OlmoeForCausalLM", "olmoe", separate(), num_experts=8, intermediate_size=WIDTH,
         norm_topk_prob=True),
    make("PanguUltraMoEForCausalLM", "PanguUltraMoE", separate(), (1,), sandwich_norm=True,
         router_enable_expert_bias=True, **DEEPSEEK | MLA | dict(q_lora_rank=32)),
    make("PanguProMoEV2ForCausalLM", "PanguProMoE", separate(), (1,), sandwich_norm=True,
         router_enable_expert_bias=True, **DEEPSEEK),
    make("Param2MoEForCausalLM", "param2moe", separate(), (1,), **BAILING),
    make("PhiMoEForCausalLM", "phimoe", separate(_SPARSE, _W123), num_local_experts=8,
         intermediate_size=WIDTH, router_jitter_noise=0.01, lm_head_bias=True),
    make("Qwen3NextForCausalLM", "qwen3_next", separate(), num_experts=8, decoder_sparse_step=1,
         mlp_only_layers=[], norm_topk_prob=True, shared_expert_intermediate_size=WIDTH,
         partial_rotary_factor=0.5, **_LINEAR),
    make("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", stacked(), num_experts=8,
         shared_expert_intermediate_size=WIDTH, partial_rotary_factor=0.5, **_LINEAR),
    make("SarvamMoEForCausalLM", "sarvam_moe", separate(), (1,), **BAILING),
    make("SarvamMLAForCausalLM", "sarvam_mla", separate(), (1,), **BAILING | MLA),
    make("Step3TextForCausalLM", "step3_text", _STEP, (1,), moe_num_experts=8, moe_top_k=2,
         norm_expert_weight=True, share_expert_dim=WIDTH, share_q_dim=64, moe_layers_enum="1",
         max_position_embedding=128),
    make("Step3p5ForCausalLM", "step3p5", _STEP, (1,), moe_num_experts=8, moe_top_k=2,
         norm_expert_weight=True, share_expert_dim=WIDTH, moe_layers_enum="1",
         moe_router_scaling_factor=1.0, moe_router_activation="sigmoid", use_moe_router_bias=True,
         need_fp32_gate=True, num_attention_groups=2, att_impl_type="GQA",
         layer_types=["full_attention", "full_attention"], sliding_window=32),
    make("FlexOlmoForCausalLM", "flex_olmo", separate(), num_experts=8, norm_topk_prob=True,
         intermediate_size=WIDTH),
    make("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", separate(), num_experts=8, moe_topk=2,
         num_shared_expert=1, use_qk_norm=True),
    make("MellumForCausalLM", "mellum", separate(), num_experts=8, norm_topk_prob=True),
    make("TransformersMoEForCausalLM", "qwen3_moe", separate(), num_experts=8,
         decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
         engine={"model_impl": "transformers"}),
    make("OpenAIPrivacyFilterForTokenClassification", "openai_privacy_filter", (
             *stacked(transposed=True),
             Part("model.layers.{layer}.mlp.experts.gate_up_proj_bias", "w13_bias", (2 * WIDTH,)),
             Part("model.layers.{layer}.mlp.experts.down_proj_bias", "w2_bias", (HIDDEN,)),
         ), num_local_experts=8, intermediate_size=WIDTH, sliding_window=32, attention_bias=True,
         num_labels=3),
    make("DeepseekV4ForCausalLM", "deepseek_v4", separate(
             "layers.{layer}.ffn.experts.{expert}.", _W123), n_routed_experts=8, n_shared_experts=1,
         hc_eps=1e-6, hc_mult=4, hc_sinkhorn_iters=4, index_topk=16, index_n_heads=2,
         index_head_dim=128, head_dim=512, num_hash_layers=0, swiglu_limit=10.0,
         norm_topk_prob=True, scoring_func="sqrtsoftplus", topk_method="noaux_tc",
         routed_scaling_factor=1.5, q_lora_rank=32, qk_rope_head_dim=32, o_lora_rank=32, o_groups=2,
         sliding_window=32, compress_ratios=[0, 4], compress_rope_theta=10000.0),
    make("HYV4ForCausalLM", "hy_v4", separate(), (1,), num_experts=8, num_shared_experts=1,
         expert_hidden_dim=WIDTH, mlp_layer_types=["dense", "sparse"], route_norm=True,
         router_scaling_factor=1.5, hc_mult=4, hc_eps=1e-6, index_topk=16,
         soft_logits_capping_logits=0.0, **DEEPSEEK | MLA | dict(q_lora_rank=32)),
    make("KimiLinearForCausalLM", "kimi_linear", separate(_SPARSE, _W123), (1,),
         engine=NO_PREFIX_CACHING, loaded_only=_KIMI_MLA, num_experts=8, num_shared_experts=1,
         first_k_dense_replace=1, moe_layer_freq=1, num_experts_per_token=2, moe_renormalize=True,
         moe_router_activation_func="sigmoid", use_grouped_topk=True, num_expert_group=1,
         topk_group=1, routed_scaling_factor=1.5, mla_use_nope=True,
         linear_attn_config=dict(kda_layers=[1], full_attn_layers=[2], num_heads=2, head_dim=32,
                                 short_conv_kernel_size=4), **MLA),
    make("MiniMaxM3SparseForCausalLM", "minimax_m3", separate(_SPARSE, _W123), (1,),
         loaded_only=NO_KERNEL,
         num_local_experts=8, intermediate_size=WIDTH, dense_intermediate_size=64,
         hidden_act="swigluoai", scoring_func="sigmoid", swiglu_alpha=1.7, swiglu_beta=1.0,
         swiglu_limit=7.0, use_gemma_norm=True, partial_rotary_factor=0.5, rotary_dim=16,
         moe_layer_freq=[0, 1], sparse_attention_config=None, use_qk_norm=True),
    make("Glm5NextForCausalLM", "glm5_next_text", separate(), (1,), engine=NO_PREFIX_CACHING,
         hc_mult=4, hc_eps=1e-6, hc_sinkhorn_iters=4, index_topk=16, index_kpool=4,
         mhc=True, mla_use_nope=True, indexer_rope_interleave=True,
         layer_types=["linear_attention"] * 2, linear_conv_kernel_dim=4,
         linear_head_dim=32, linear_num_heads=2, mlp_layer_types=["dense", "sparse"],
         swiglu_limit=10.0, **DEEPSEEK | MLA | dict(q_lora_rank=32, qk_rope_head_dim=0)),
    make("Dots3NoteForCausalLM", "dots3_note", separate(), (1,), unbuildable=(
             "cannot import name 'compile_flash_attn_varlen_func_from_specs'"), cause=(
             "its module imports FlashAttention, which vLLM builds for CUDA only"), **DEEPSEEK),
    make("Qwen4ExpForCausalLM", "qwen4_exp_text", stacked(), output_gate_type="silu", num_experts=8,
         shared_expert_intermediate_size=WIDTH, partial_rotary_factor=0.5, **_LINEAR),
]  # fmt: skip
