"""List recipes of quantized experts: Qwen3-MoE and gpt-oss in each form of a checkpoint."""

from __future__ import annotations

from typing import Any

from tests.zoo.checkpoint import EXPERTS, Part
from tests.zoo.vllm.recipe import NEEDS_AMX, Recipe, make

_IN, _OUT = 128, 128
"""Hidden size and intermediate size of quantized experts: blocks of 128 x 128 have to fit."""

_GROUP = 32

_NOT = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]


def _each(*kinds: tuple[str, str, Any, str]) -> tuple[Part, ...]:
    """Return the parts of the three projections.

    Args:
        kinds: (suffix of the name, end of the parameter's name, shape from (outputs, inputs),
            dtype).
    """
    parts = []
    sizes = {"gate_proj": (_OUT, _IN), "up_proj": (_OUT, _IN), "down_proj": (_IN, _OUT)}
    for projection, (outputs, inputs) in sizes.items():
        half = "w2" if projection == "down_proj" else "w13"
        for suffix, end, shape, dtype in kinds:
            name = f"model.layers.{{layer}}.mlp.experts.{{expert}}.{projection}.{suffix}"
            parameter = f"{half}_{end}" if end else ""
            parts.append(Part(name, parameter, shape(outputs, inputs), dtype, spread=0.05))
    return tuple(parts)


def _qwen(name: str, quantization: dict[str, Any], parts: tuple[Part, ...], **more: Any) -> Recipe:
    return make(
        "Qwen3MoeForCausalLM", "qwen3_moe", parts, name=f"Qwen3MoeForCausalLM {name}",
        num_experts=EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
        hidden_size=_IN, moe_intermediate_size=_OUT, quantization_config=quantization,
        engine={"dtype": "bfloat16"}, loaded_only=NEEDS_AMX, **more,
    )  # fmt: skip


def _compressed(kind: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": _NOT,
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}
_DYNAMIC = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}

RECIPES = [
    _qwen("fp8 per tensor", _FP8, _each(
        ("weight", "weight", lambda o, i: (o, i), "F8_E4M3"),
        ("weight_scale", "weight_scale", lambda o, i: (), "F32"))),
    _qwen("fp8 in blocks", _FP8 | {"weight_block_size": [128, 128]}, head_dim=128, parts=_each(
        ("weight", "weight", lambda o, i: (o, i), "F8_E4M3"),
        ("weight_scale_inv", "weight_scale_inv", lambda o, i: (o // 128, i // 128), "F32"))),
    _qwen("int8 per channel", quantization=_compressed(
        "int-quantized",
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
        _DYNAMIC | {"type": "int"}), parts=_each(
        ("weight", "weight", lambda o, i: (o, i), "I8"),
        ("weight_scale", "weight_scale", lambda o, i: (o, 1), "F32"))),
    _qwen("int4 packed, compressed-tensors", unbuildable="No WNA16 MoE backend supports",
          quantization=_compressed(
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP,
         "symmetric": True, "dynamic": False}, None), parts=_each(
        ("weight_packed", "weight_packed", lambda o, i: (o, i // 8), "I32"),
        ("weight_scale", "weight_scale", lambda o, i: (o, i // _GROUP), "F32"),
        ("weight_shape", "", lambda o, i: (o, i), "SHAPE"))),
    _qwen("int4 packed, AWQ", quantization={
        "quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": ["self_attn", "mlp.gate"]}, parts=_each(
        ("qweight", "qweight", lambda o, i: (i, o // 8), "I32"),
        ("qzeros", "qzeros", lambda o, i: (i // _GROUP, o // 8), "I32"),
        ("scales", "scales", lambda o, i: (i // _GROUP, o), "F32"))),
    _qwen("int4 packed, GPTQ", quantization={
        "quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
          parts=_each(
        ("qweight", "qweight", lambda o, i: (i // 8, o), "I32"),
        ("qzeros", "qzeros", lambda o, i: (i // _GROUP, o // 8), "I32"),
        ("scales", "scales", lambda o, i: (i // _GROUP, o), "F32"),
        ("g_idx", "", lambda o, i: (i,), "INDEX"))),
    make("GptOssForCausalLM", "gpt_oss", (
             Part("model.layers.{layer}.mlp.experts.gate_up_proj_blocks", "w13_weight",
                  (2 * _OUT, _IN // 32, 16), "U8"),
             Part("model.layers.{layer}.mlp.experts.gate_up_proj_scales", "w13_weight_scale",
                  (2 * _OUT, _IN // 32), "U8"),
             Part("model.layers.{layer}.mlp.experts.gate_up_proj_bias", "w13_bias", (2 * _OUT,)),
             Part("model.layers.{layer}.mlp.experts.down_proj_blocks", "w2_weight",
                  (_IN, _OUT // 32, 16), "U8"),
             Part("model.layers.{layer}.mlp.experts.down_proj_scales", "w2_weight_scale",
                  (_IN, _OUT // 32), "U8"),
             Part("model.layers.{layer}.mlp.experts.down_proj_bias", "w2_bias", (_IN,)),
         ), name="GptOssForCausalLM mxfp4", 
         num_local_experts=8, hidden_size=_IN,
         intermediate_size=_OUT, sliding_window=32, attention_bias=True,
         layer_types=["sliding_attention", "full_attention"], swiglu_limit=7.0,
         engine={"dtype": "bfloat16"}, loaded_only=NEEDS_AMX, quantization_config={
             "quant_method": "mxfp4", "modules_to_not_convert": [
                 "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                 "lm_head"]},
         rope_parameters={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "rope_theta": 150000.0, "original_max_position_embeddings": 4096,
                          "truncate": False}),
]  # fmt: skip
