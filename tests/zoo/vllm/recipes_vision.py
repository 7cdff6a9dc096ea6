"""List recipes of models that also see or hear: their language model alone.

It holds the experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.zoo.checkpoint import HIDDEN, WIDTH, Part
from tests.zoo.vllm.recipe import Recipe, config, make, separate, stacked
from tests.zoo.vllm.recipes_more import _LINEAR

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


_OF_RECIPE = ("ranks_differ", "unbuildable", "cause", "engine", "lacks", "loaded_only")


def _with_text(
    architecture: str, model_type: str, text_type: str, parts: tuple[Part, ...],
    layers: tuple[int, ...] = (0, 1), vision: dict[str, Any] | None = None,
    whole: dict[str, Any] | None = None, **text: Any,
) -> Recipe:  # fmt: skip
    of_recipe = {key: text.pop(key) for key in _OF_RECIPE if key in text}
    engine = {"language_model_only": True} | of_recipe.pop("engine", {})
    inner = config("", text_type, **text)
    del inner["architectures"]
    return make(
        architecture, model_type, parts, layers, engine=engine,
        text_config=inner, vision_config=vision or {}, **(whole or {}), **of_recipe,
    )  # fmt: skip


_FOURIER = _MROPE | {"fope_init_factor": 0.1, "fope_sep_head": True, "num_inv_freq": 16}


@dataclass(frozen=True)
class _Vision(Part):
    """Describe a tensor of the experts for images, numbered behind those for text.

    Its values do not matter.
    """

    def tensors(self, layer: int, experts: int) -> dict[str, np.ndarray]:
        """Name -> tensor of one layer."""
        return {
            self.name.format(layer=layer, expert=experts + e): self.of_expert(layer, experts + e)
            for e in range(experts)
        }


def _thinker(inner: dict[str, Any]) -> dict[str, Any]:
    """Return Qwen3-Omni's config in its config."""
    del inner["architectures"]
    return {
        "thinker_config": {
            "text_config": inner,
            "vision_config": _QWEN_EYES | dict(apply_vit_abs_pos_embed=True),
            "audio_config": dict(encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
                                 d_model=32, output_dim=HIDDEN, downsample_hidden_size=16),
        },
        "enable_audio_output": False,
    }  # fmt: skip


_QWEN_EYES = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2,
                  out_hidden_size=HIDDEN, deepstack_visual_indexes=[0], patch_size=16,
                  num_position_embeddings=16, image_size=32)  # fmt: skip

_ERNIE = make(
    "Ernie4_5_VLMoeForConditionalGeneration", "ernie4_5_moe_vl", separate(), (1,),
    owner="text_experts", engine={"language_model_only": True}, vision_config=dict(
        depth=1, embed_dim=32, hidden_size=32, hidden_act="quick_gelu", mlp_ratio=2, num_heads=2,
        in_channels=3, patch_size=14, spatial_merge_size=2),
    pixel_hidden_size=32, spatial_conv_size=2, temporal_conv_size=2, use_temporal_conv=True,
    im_patch_id=99, rope_scaling={"mrope_section": [4, 4, 8]}, moe_num_experts=[8, 8], moe_k=2,
    moe_num_shared_experts=1, moe_intermediate_size=[WIDTH, WIDTH], moe_layer_start_index=[1, 1],
    moe_layer_end_index=[1, 1], moe_layer_interval=1, use_bias=False, freq_allocation=4,
)  # fmt: skip
_ERNIE = replace(
    _ERNIE,
    parts=(*_ERNIE.parts, *(_Vision(part.name, "", part.shape) for part in _ERNIE.parts)),
)

RECIPES = [
    _with_text("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", "qwen3_vl_moe_text",
               stacked("model.language_model.layers.{layer}.mlp.experts.", transposed=True),
               vision=_QWEN_EYES, num_experts=8, decoder_sparse_step=1, mlp_only_layers=[],
               norm_topk_prob=True, rope_parameters=_MROPE),
    _with_text("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "qwen3_5_moe_text",
               stacked("model.language_model.layers.{layer}.mlp.experts."), vision=_QWEN_EYES,
               num_experts=8, shared_expert_intermediate_size=WIDTH, partial_rotary_factor=0.5,
               **_LINEAR),
    _with_text("Llama4ForConditionalGeneration", "llama4", "llama4_text", stacked(
                   "language_model.model.layers.{layer}.feed_forward.experts.", transposed=True),
               (1,), vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=128, vision_output_dim=32, image_size=28,
                                 projector_input_dim=32, projector_output_dim=32),
               num_local_experts=8, intermediate_size=WIDTH, intermediate_size_mlp=64,
               interleave_moe_layer_step=2, num_experts_per_tok=1, use_qk_norm=True,
               attention_chunk_size=64, no_rope_layers=[1, 0], moe_layers=[1],
               layer_types=["chunked_attention", "full_attention"]),
    _with_text("Gemma4ForConditionalGeneration", "gemma4", "gemma4_text",
               stacked("model.language_model.layers.{layer}.experts."),
               vision=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, head_dim=16, intermediate_size=32),
               whole={"audio_config": None},
               num_experts=8, top_k_experts=2, enable_moe_block=True, sliding_window=32,
               hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0,
               layer_types=["sliding_attention", "full_attention"], global_head_dim=32,
               rope_parameters={"sliding_attention": _ROPE, "full_attention": _ROPE}),
    _with_text("AriaForConditionalGeneration", "aria", "aria_text", (
                   Part("language_model.model.layers.{layer}.mlp.experts.fc1.weight", "w13_weight",
                        (HIDDEN, 2 * WIDTH)),
                   Part("language_model.model.layers.{layer}.mlp.experts.fc2.weight", "w2_weight",
                        (WIDTH, HIDDEN)),
               ), vision=dict(model_type="idefics3_vision", hidden_size=32, num_hidden_layers=1,
                              num_attention_heads=2, intermediate_size=32, image_size=28),
               whole={"projector_patch_to_query_dict": {"4": 4}, "image_token_index": 9},
               moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1, intermediate_size=WIDTH,
               ranks_differ=(
                   "vLLM sums the shared experts' answers over the ranks twice, in their own MLP "
                   "and in the MoE layer")),
    _with_text("InternS1ProForConditionalGeneration", "qwen3_vl_moe", "qwen3_vl_moe_text",
               stacked("model.language_model.layers.{layer}.mlp.experts.", transposed=True),
               vision=_QWEN_EYES, num_experts=8, decoder_sparse_step=1, mlp_only_layers=[],
               norm_topk_prob=True, rope_scaling=_FOURIER, rope_parameters=_FOURIER,
               unbuildable="object has no attribute 'model_config'",
               cause="its class reads model_config, which it never sets, on any hardware"),
    make("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe",
         separate("thinker.model.layers.{layer}.mlp.experts.{expert}."),
         engine={"language_model_only": True}, **_thinker(config(
             "", "qwen3_omni_moe_text", num_experts=8, decoder_sparse_step=1, mlp_only_layers=[],
             norm_topk_prob=True, rope_parameters=_MROPE))),
    _ERNIE,
]  # fmt: skip
