"""List recipes of drafts: the layers that a checkpoint has for predicting several tokens.

Each is loaded as a model of its own.

A draft is as large as the model of the zoo that it drafts for; only what differs stands here.
"""

from __future__ import annotations

from typing import Any

from tests.zoo.checkpoint import Part
from tests.zoo.vllm import recipes_more, recipes_text
from tests.zoo.vllm.recipe import (
    NO_PREFIX_CACHING,
    NO_SPARSE,
    OWN_CHECKPOINT,
    Recipe,
    make,
    separate,
    stacked,
)
from tests.zoo.vllm.recipes_more import _SPARSE, _W123

_MODELS = {recipe.name: recipe for recipe in (*recipes_text.RECIPES, *recipes_more.RECIPES)}


def _config_of(model: str) -> dict[str, Any]:
    """Return a model's config without its name."""
    return {k: v for k, v in _MODELS[model].config.items() if k != "architectures"}


def _draft(
    draft: str,
    model: str,
    layer: int = 2,
    parts: tuple[Part, ...] = (),
    method: dict[str, Any] | None = None,
    **own: Any,
) -> Recipe:
    """Make a draft in the checkpoint of the model that it drafts for.

    Args:
        draft: its architecture.
        model: recipe of the model.
        layer: number of the draft's layer in vLLM.
        parts: tensors of an expert; the model's own when empty.
        method: further keys of the ``speculative_config``.
        own: what differs from the model's config, and keys of `Recipe`.
    """
    speculative = {"method": "mtp", "num_speculative_tokens": 1} | (method or {})
    engine = {**_MODELS[model].engine, "speculative_config": speculative}
    values = _config_of(model) | {"num_nextn_predict_layers": 1} | own
    kind = values.pop("model_type")
    return make(
        _MODELS[model].architecture, kind, parts or _MODELS[model].parts, (layer,), name=draft,
        draft=draft, engine=engine, **values,
    )  # fmt: skip


def _beside(
    draft: str, model: str, parts: tuple[Part, ...], method: str, layer: int = 1, **own: Any
) -> Recipe:
    """Make a draft that has a checkpoint of its own.

    Its config.json is the model's too, both have one layer.

    The draft's layer is number 0 in the checkpoint; vLLM goes on counting behind the model's.
    """
    own = {"num_hidden_layers": 1, "first_k_dense_replace": 0} | own
    speculative = {"method": method, "model": OWN_CHECKPOINT}
    return _draft(draft, model, layer, parts, speculative, **own)


def _of_seeing(
    draft: str, seeing: str, kind: str, model: str, layer: int = 2, parts: tuple[Part, ...] = (),
    text_type: str = "", **own: Any,
) -> Recipe:  # fmt: skip
    """Make a draft of a model that also sees.

    The language model's config stands within that one's.

    Args:
        seeing: architecture of the model that sees.
        kind: its ``model_type``.
        model: recipe of its language model.
        text_type: ``model_type`` of the language model in there, where it is another.
    """
    of_recipe = {k: own.pop(k) for k in ("unbuildable", "loaded_only", "model_experts") if k in own}
    text = _config_of(model) | {"num_nextn_predict_layers": 1} | own
    text["model_type"] = text_type or text["model_type"]
    engine = {
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 1},
        "language_model_only": True,
    }
    return make(
        seeing, kind, parts or _MODELS[model].parts, (layer,), name=draft, draft=draft,
        hidden_size=None, vocab_size=None, text_config=text, vision_config=None,
        engine=engine | NO_PREFIX_CACHING, **of_recipe,
    )  # fmt: skip


_OWN_LAYER = "mtp.layers.0.mlp.experts."
_V4_PARTS = separate("mtp.0.ffn.experts.{expert}.", _W123)
_ONE_LAYER = separate("layers.0.mlp.experts.{expert}.")

RECIPES = [
    _draft("DeepSeekMTPModel", "DeepseekV3ForCausalLM", num_hidden_layers=2),
    _draft("Glm4MoeMTPModel", "Glm4MoeForCausalLM"),
    _draft("Glm4MoeLiteMTPModel", "Glm4MoeLiteForCausalLM"),
    _draft("HYV3MTPModel", "HYV3ForCausalLM"),
    _draft("OpenPanguMTPModel", "PanguUltraMoEForCausalLM", model_type="pangu_ultra_moe"),
    _draft("Qwen3NextMTP", "Qwen3NextForCausalLM", 0, separate(f"{_OWN_LAYER}{{expert}}.")),
    _draft("Qwen3_5MoeMTP", "Qwen3_5MoeForCausalLM", 0, stacked(_OWN_LAYER),
           mtp_num_hidden_layers=1),
    _draft("Step3p5MTP", "Step3p5ForCausalLM", moe_layers_enum="1,2", layer_types=None,
           unbuildable="KeyError: 'model.layers.2.mtp_block.moe.experts.w2_weight'"),
    _draft("BailingMoeV25MTPModel", "BailingMoeV2_5ForCausalLM"),
    _draft("BailingMoeV3MTPModel", "BailingMoeV3ForCausalLM"),
    _draft("HYV4MTPModel", "HYV4ForCausalLM"),
    _draft("Qwen4ExpMTP", "Qwen4ExpForCausalLM", parts=stacked(_OWN_LAYER),
           mtp_num_hidden_layers=1),
    _draft("DeepseekV32MTPModel", "DeepseekV32ForCausalLM", unbuildable=NO_SPARSE),
    _draft("NemotronHMTPModel", "NemotronHForCausalLM", 3, separate(
               "mtp.layers.1.mixer.experts.{expert}.")[1:], mtp_hybrid_override_pattern="*E",
           unbuildable="is_act_and_mul=False is supported only for CUDA, XPU and ROCm"),
    _draft("DeepSeekV4MTPModel", "DeepseekV4ForCausalLM", parts=_V4_PARTS,
           unbuildable="speculative decoding (MTP) is not implemented on CPU"),
    _draft("Dots3NoteMTPModel", "Dots3NoteForCausalLM",
           unbuildable="cannot import name 'compile_flash_attn_varlen_func_from_specs'"),
    _of_seeing("InternS2MobiusMTP", "InternS2MobiusForConditionalGeneration", "interns2_mobius",
               "Qwen3_5MoeForCausalLM", 0, stacked(_OWN_LAYER), num_experts=4, model_experts=4,
               mtp_num_experts=8, mtp_num_experts_per_tok=2, num_blocks=2, mtp_num_hidden_layers=1),
    _of_seeing("Glm5NextMTPModel", "Glm5NextForConditionalGeneration", "glm5_next",
               "Glm5NextForCausalLM", unbuildable=NO_SPARSE),
    _of_seeing("KimiK3MTPModel", "KimiK3ForConditionalGeneration", "kimi_k3",
               "KimiLinearForCausalLM", loaded_only=_MODELS["KimiLinearForCausalLM"].loaded_only),
    _of_seeing("MiniMaxM3MTP", "MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl",
               "MiniMaxM3SparseForCausalLM", 0, separate(_SPARSE.replace(
                   "layers.{layer}", "mtp.layers.0"), _W123), text_type="minimax_m3_text",
               unbuildable="No Unquantized MoE backend supports the deployment configuration",
               num_mtp_modules=1,
               sparse_attention_config=dict(sparse_index_dim=32, sparse_num_index_heads=2,
                                            sparse_topk_blocks=16, sparse_block_size=128,
                                            sparse_attention_freq=[0, 0])),
    _beside("DSparkDraftModel", "DeepseekV4ForCausalLM", _V4_PARTS, "dspark", compress_ratios=[4],
            unbuildable="Model Runner V1 does not support: dspark speculative decoding"),
    _beside("EagleDeepSeekMTPModel", "DeepseekV3ForCausalLM", _ONE_LAYER, "eagle"),
    _beside("EagleMistralLarge3ForCausalLM", "MistralLarge3ForCausalLM",
            separate("model.layers.0.mlp.experts.{expert}."), "eagle", unbuildable=(
                "'EagleMistralLarge3Model' object has no attribute "
                "'is_fused_shared_expert_enabled'")),
    _beside("EagleMiniCPMForCausalLM", "MiniCPMForCausalLM", separate(
                "model.eagle_layers.0.mlp.experts.{expert}.", _W123), "eagle", own_kind=True,
            eplb=False, num_nextn_predict_layers=None),
    _beside("DFlashLagunaForCausalLM", "LagunaForCausalLM", _ONE_LAYER, "dflash", layer=0,
            num_nextn_predict_layers=None, mlp_layer_types=["sparse"],
            layer_types=["full_attention"], draft_vocab_size=128,
            dflash_config=dict(target_layer_ids=[0], mask_token_id=3),
            unbuildable="KeyError: 'layers.0.mlp.experts.0.down_proj.weight'"),
]  # fmt: skip
