"""List recipes of language models, A to M."""

from __future__ import annotations

from tests.zoo.checkpoint import HIDDEN, WIDTH, Part
from tests.zoo.vllm.recipe import NO_PREFIX_CACHING, SPARSE, make, separate, stacked

MLA = dict(
    kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
)  # fmt: skip
"""Attention of DeepSeek's models."""

DEEPSEEK = dict(
    n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1, moe_layer_freq=1, n_group=4,
    topk_group=2, topk_method="noaux_tc", scoring_func="sigmoid", routed_scaling_factor=2.5,
    norm_topk_prob=True, num_nextn_predict_layers=0,
)  # fmt: skip
"""Routing of DeepSeek-V3."""

_W123 = ("w1", "w3", "w2")
_SPARSE = "model.layers.{layer}.block_sparse_moe.experts.{expert}."
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

BAILING = dict(
    num_experts=8, num_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True,
    moe_shared_expert_intermediate_size=WIDTH, use_bias=False, use_qkv_bias=False,
    embedding_dropout=0.0, n_group=4, topk_group=2, score_function="sigmoid",
    moe_router_enable_expert_bias=True, routed_scaling_factor=2.5, router_dtype="fp32",
    rope_parameters=_ROPE,
)  # fmt: skip

RECIPES = [
    make("Qwen3MoeForCausalLM", "qwen3_moe", separate(), num_experts=8, decoder_sparse_step=1,
         mlp_only_layers=[], norm_topk_prob=True),
    make("Qwen3MoeForCausalLM", "qwen3_moe", stacked(), name="Qwen3MoeForCausalLM fused",
         num_experts=8, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True),
    make("Qwen2MoeForCausalLM", "qwen2_moe", separate(), (1, 3), num_hidden_layers=4, num_experts=8,
         decoder_sparse_step=2, mlp_only_layers=[], norm_topk_prob=True,
         shared_expert_intermediate_size=WIDTH),
    make("MixtralForCausalLM", "mixtral", separate(_SPARSE, _W123), num_local_experts=8,
         intermediate_size=WIDTH),
    make("DeepseekForCausalLM", "deepseek_v2", separate(), (1,), **DEEPSEEK | MLA | dict(
         topk_method="greedy", scoring_func="softmax", n_group=1, topk_group=1, kv_lora_rank=None,
         qk_nope_head_dim=0, qk_rope_head_dim=0)),
    make("DeepseekV2ForCausalLM", "deepseek_v2", separate(), (1,), **DEEPSEEK | MLA | dict(
         topk_method="greedy", scoring_func="softmax", n_group=1, topk_group=1)),
    make("DeepseekV3ForCausalLM", "deepseek_v3", separate(), (1, 2), num_hidden_layers=3,
         **DEEPSEEK | MLA),
    make("DeepseekV3BidirectionalModel", "deepseek_v3", separate(), (1,), **DEEPSEEK | MLA),
    make("MistralLarge3ForCausalLM", "deepseek_v3", separate(), (1,), **DEEPSEEK | MLA),
    make("DeepseekV32ForCausalLM", "deepseek_v32", separate(), (1,), index_topk=16,
         lacks=SPARSE,
         index_n_heads=2, index_head_dim=64, **DEEPSEEK | MLA | dict(q_lora_rank=32)),
    make("GlmMoeDsaForCausalLM", "glm_moe_dsa", separate(), (1,), index_topk=16,
         lacks=SPARSE,
         index_n_heads=2, index_head_dim=64, **DEEPSEEK | MLA | dict(q_lora_rank=32)),
    make("Glm4MoeForCausalLM", "glm4_moe", separate(), (1,), use_qk_norm=True,
         partial_rotary_factor=0.5, **DEEPSEEK),
    make("Glm4MoeLiteForCausalLM", "glm4_moe_lite", separate(), (1,), **DEEPSEEK | MLA | dict(
         q_lora_rank=32)),
    make("AXK1ForCausalLM", "axk1", separate(), (1,), **DEEPSEEK | MLA | dict(q_lora_rank=32)),
    make("AfmoeForCausalLM", "afmoe", separate(), (1,), num_experts=8, num_shared_experts=1,
         num_dense_layers=1, route_norm=True, route_scale=2.0, score_func="sigmoid", n_group=1,
         topk_group=1, mup_enabled=True, sliding_window=32,
         layer_types=["full_attention", "full_attention"]),
    make("BailingMoeForCausalLM", "bailing_moe", separate(), (1,), **BAILING),
    make("BailingMoeV2ForCausalLM", "bailing_moe_v2", separate(), (1,), use_qk_norm=True,
         **BAILING),
    make("BailingMoeV2_5ForCausalLM", "bailing_hybrid", separate(), (1,),
         engine=NO_PREFIX_CACHING, layer_group_size=2, group_norm_size=2,
         **BAILING | MLA),
    make("BailingMoeV3ForCausalLM", "bailing_hybrid_v3", separate(), (1,), layer_group_size=2,
         short_conv_kernel_size=4, no_kda_lora=True, **BAILING | MLA),
    make("Cohere2MoeForCausalLM", "cohere2_moe", separate(), num_experts=8, num_shared_experts=1,
         expert_selection_fn="sigmoid", layer_norm_eps=1e-5, logit_scale=1.0, sliding_window=32,
         layer_types=["full_attention", "full_attention"], intermediate_size=WIDTH,
         mlp_layer_types=["sparse", "sparse"], prefix_dense_intermediate_size=64,
         rope_parameters=_ROPE),
    make("DbrxForCausalLM", "dbrx", unbuildable="KeyError: 'blocks.0.ffn.experts.w13_weight'",
         cause=(
             "its loader does not know that vLLM's MoE layer has its weights in routed_experts, on "
             "any hardware"), parts=(
             Part("transformer.blocks.{layer}.ffn.experts.mlp.w1", "w13_weight", (WIDTH, HIDDEN),
                  flat=True),
             Part("transformer.blocks.{layer}.ffn.experts.mlp.v1", "w13_weight", (WIDTH, HIDDEN),
                  flat=True),
             Part("transformer.blocks.{layer}.ffn.experts.mlp.w2", "w2_weight", (WIDTH, HIDDEN),
                  flat=True),
         ), d_model=HIDDEN, n_heads=2, n_layers=2, max_seq_len=128,
         attn_config=dict(kv_n_heads=2, clip_qkv=None, rope_theta=10000.0),
         ffn_config=dict(ffn_hidden_size=WIDTH, moe_num_experts=8, moe_top_k=2)),
    make("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", separate(), (1,), moe_num_experts=8, moe_k=2,
         moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1,
         moe_layer_interval=1, use_bias=False),
    make("ExaoneMoeForCausalLM", "exaone_moe", separate(), (1,), num_experts=8,
         num_shared_experts=1, n_group=1, topk_group=1, norm_topk_prob=True,
         routed_scaling_factor=2.5, sliding_window=None, mlp_layer_types=["dense", "sparse"],
         layer_types=["full_attention", "full_attention"], first_k_dense_replace=1),
    make("Gemma4ForCausalLM", "gemma4_text", stacked("model.layers.{layer}.experts."),
         num_experts=8, top_k_experts=2, enable_moe_block=True, sliding_window=32,
         hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0,
         layer_types=["sliding_attention", "full_attention"], rope_parameters={
             "sliding_attention": _ROPE, "full_attention": _ROPE}, global_head_dim=32),
    make("GptOssForCausalLM", "gpt_oss", (
             *stacked(transposed=True),
             Part("model.layers.{layer}.mlp.experts.gate_up_proj_bias", "w13_bias", (2 * WIDTH,)),
             Part("model.layers.{layer}.mlp.experts.down_proj_bias", "w2_bias", (HIDDEN,)),
         ), num_local_experts=8, intermediate_size=WIDTH, sliding_window=32, attention_bias=True,
         layer_types=["sliding_attention", "full_attention"], swiglu_limit=7.0,
         rope_parameters={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "rope_theta": 150000.0, "original_max_position_embeddings": 4096,
                          "truncate": False}),
    make("GraniteMoeForCausalLM", "granitemoe", stacked(
             "model.layers.{layer}.block_sparse_moe.",
             ("input_linear.weight", "output_linear.weight")),
         num_local_experts=8, intermediate_size=WIDTH, embedding_multiplier=1.0,
         attention_multiplier=0.1, logits_scaling=1.0, residual_multiplier=1.0),
    make("GraniteMoeSharedForCausalLM", "granitemoeshared", stacked(
             "model.layers.{layer}.block_sparse_moe.",
             ("input_linear.weight", "output_linear.weight")),
         num_local_experts=8, intermediate_size=WIDTH, embedding_multiplier=1.0,
         attention_multiplier=0.1, logits_scaling=1.0, residual_multiplier=1.0,
         shared_intermediate_size=WIDTH),
    make("GraniteMoeSWAForCausalLM", "granitemoe_swa", stacked(
             "model.layers.{layer}.block_sparse_moe.",
             ("input_linear.weight", "output_linear.weight")),
         num_local_experts=8, intermediate_size=WIDTH, embedding_multiplier=1.0,
         attention_multiplier=0.1, logits_scaling=1.0, residual_multiplier=1.0,
         shared_intermediate_size=WIDTH),
    make("GraniteMoeHybridForCausalLM", "granitemoehybrid", stacked(
             "model.layers.{layer}.block_sparse_moe.",
             ("input_linear.weight", "output_linear.weight")),
         num_local_experts=8, intermediate_size=WIDTH, embedding_multiplier=1.0,
         attention_multiplier=0.1, logits_scaling=1.0, residual_multiplier=1.0,
         shared_intermediate_size=WIDTH, layer_types=["mamba", "attention"],
         mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_d_conv=4,
         mamba_expand=2, mamba_chunk_size=16, mamba_conv_bias=True, mamba_proj_bias=False,
         position_embedding_type="nope"),
    make("HYV3ForCausalLM", "hy_v3", separate(), (1,), num_experts=8, num_shared_experts=1,
         expert_hidden_dim=WIDTH, first_k_dense_replace=1, route_norm=True,
         router_scaling_factor=1.5, qk_norm=True),
    make("JambaForCausalLM", "jamba",
         separate("model.layers.{layer}.feed_forward.experts.{expert}."), (1,),
         num_experts=8, intermediate_size=WIDTH, attn_layer_offset=0, attn_layer_period=2,
         expert_layer_offset=1, expert_layer_period=2, mamba_d_conv=4, mamba_d_state=16,
         mamba_dt_rank=8, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False,
         use_mamba_kernels=False),
    make("K2HorizonForCausalLM", "k2_horizon", separate(), num_experts=8, num_shared_experts=1,
         attention_gate_func="sigmoid", decoder_sparse_step=1, layernorm_num_groups=1,
         mlp_only_layers=[], moe_gate_bias=False, mova_num_experts=0, mova_num_experts_per_tok=0,
         norm_topk_prob=True, query_key_norm=True, rope_head_dim=32, router_scaling_factor=1.0,
         router_score_func="sigmoid"),
    make("LagunaForCausalLM", "laguna", separate(), (1,), num_experts=8, gating=True,
         shared_expert_intermediate_size=WIDTH, mlp_layer_types=["dense", "sparse"],
         layer_types=["full_attention", "full_attention"], sliding_window=None,
         moe_apply_router_weight_on_input=False, rope_parameters=_ROPE),
    make("Lfm2MoeForCausalLM", "lfm2_moe", separate(
             "model.layers.{layer}.feed_forward.experts.{expert}.", _W123), (1,), num_experts=8,
         conv_L_cache=3, conv_bias=False, layer_types=["conv", "full_attention"], norm_eps=1e-5,
         norm_topk_prob=True, num_dense_layers=1, routed_scaling_factor=1.0, use_expert_bias=True),
    make("Llama4ForCausalLM", "llama4_text", separate(
             "model.layers.{layer}.feed_forward.experts.{expert}."), (1,), num_local_experts=8,
         intermediate_size=WIDTH, intermediate_size_mlp=64, interleave_moe_layer_step=2,
         num_experts_per_tok=1, use_qk_norm=True, attention_chunk_size=64, no_rope_layers=[1, 0],
         layer_types=["chunked_attention", "full_attention"], moe_layers=[1]),
    make("Llama4ForCausalLM", "llama4_text", stacked(
             "model.layers.{layer}.feed_forward.experts.", transposed=True), (1,),
         name="Llama4ForCausalLM fused", num_local_experts=8,
         intermediate_size=WIDTH, intermediate_size_mlp=64, interleave_moe_layer_step=2,
         num_experts_per_tok=1, use_qk_norm=True, attention_chunk_size=64, no_rope_layers=[1, 0],
         layer_types=["chunked_attention", "full_attention"], moe_layers=[1]),
]  # fmt: skip
