"""Recipes of drafts: the layers that a checkpoint has for predicting several tokens, loaded as a model of their own."""

from __future__ import annotations

from typing import Any

from tests.zoo.checkpoint import WIDTH, Part
from tests.zoo.vllm.recipe import MAMBA_BLOCK, Recipe, make, separate, stacked
from tests.zoo.vllm.recipes_more import _LINEAR, _STEP
from tests.zoo.vllm.recipes_text import BAILING, DEEPSEEK, MLA

_MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


def _draft(
    draft: str, main: str, model_type: str, parts: tuple[Part, ...], layer: int = 2, **own: Any
) -> Recipe:
    engine = _MTP | own.pop("engine", {})
    own = {"num_nextn_predict_layers": 1} | own
    return make(main, model_type, parts, (layer,), name=draft, draft=draft, engine=engine, **own)


_DEEPSEEK = DEEPSEEK | dict(num_nextn_predict_layers=1)
_OWN_LAYER = "mtp.layers.0.mlp.experts."

RECIPES = [
    _draft("DeepSeekMTPModel", "DeepseekV3ForCausalLM", "deepseek_v3", separate(),
           **_DEEPSEEK | MLA),
    _draft("Glm4MoeMTPModel", "Glm4MoeForCausalLM", "glm4_moe", separate(), use_qk_norm=True,
           partial_rotary_factor=0.5, **_DEEPSEEK),
    _draft("Glm4MoeLiteMTPModel", "Glm4MoeLiteForCausalLM", "glm4_moe_lite", separate(),
           **_DEEPSEEK | MLA | dict(q_lora_rank=32)),
    _draft("HYV3MTPModel", "HYV3ForCausalLM", "hy_v3", separate(), num_experts=8,
           num_shared_experts=1, expert_hidden_dim=WIDTH, first_k_dense_replace=1, route_norm=True,
           router_scaling_factor=1.5, qk_norm=True),
    _draft("OpenPanguMTPModel", "PanguUltraMoEForCausalLM", "pangu_ultra_moe", separate(),
           sandwich_norm=True, router_enable_expert_bias=True,
           **_DEEPSEEK | MLA | dict(q_lora_rank=32)),
    _draft("Qwen3NextMTP", "Qwen3NextForCausalLM", "qwen3_next",
           separate(f"{_OWN_LAYER}{{expert}}."), 0, num_experts=8, decoder_sparse_step=1,
           mlp_only_layers=[], norm_topk_prob=True, shared_expert_intermediate_size=WIDTH,
           partial_rotary_factor=0.5, **_LINEAR),
    _draft("Qwen3_5MoeMTP", "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", stacked(_OWN_LAYER), 0,
           num_experts=8, shared_expert_intermediate_size=WIDTH, partial_rotary_factor=0.5,
           mtp_num_hidden_layers=1, **_LINEAR),
    _draft("Step3p5MTP", "Step3p5ForCausalLM", "step3p5", _STEP, moe_num_experts=8, moe_top_k=2,
           norm_expert_weight=True, share_expert_dim=WIDTH, moe_layers_enum="1,2",
           moe_router_scaling_factor=1.0, moe_router_activation="sigmoid",
           use_moe_router_bias=True, need_fp32_gate=True, num_attention_groups=2,
           att_impl_type="GQA", layer_types=None, sliding_window=32,
           unbuildable="mtp_block.moe.experts.w"),
    _draft("BailingMoeV25MTPModel", "BailingMoeV2_5ForCausalLM", "bailing_hybrid", separate(),
           unbuildable=MAMBA_BLOCK,
           layer_group_size=2, **BAILING | MLA),
]  # fmt: skip
