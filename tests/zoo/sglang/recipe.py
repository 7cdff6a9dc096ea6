"""Say how the checkpoint of each architecture is laid out.

That is its config, and the tensors of its MoE layers by the real names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .values import EXPERTS, HIDDEN, LAYERS, WIDTH, drawn, expert

Tensors = dict[str, np.ndarray]

BASE: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256,
}

MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    # SGLang's CPU engine asserts that MLA has one.
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

GROUPED: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


@dataclass(frozen=True)
class Recipe:
    """Describe a tiny checkpoint.

    Attributes:
        architecture: the model class, as config.json names it.
        config: config.json without ``architectures``.
        moe: indices of the MoE layers.
        block: what an MoE layer's tensors are called before the parts, with ``{layer}``.
        parts: tensors of one MoE layer by name: ``parts(block, layer)``.
        width: intermediate size of an expert.
        biases: whether experts have biases.
        remote: whether the checkpoint brings its config class, as those of models that transformers
            does not know do.
        engine: further arguments of ``ServerArgs``.
        variant: what sets it apart from another recipe of the same class.
        refused: placement, or ``all``, to what the refusal must say.
        unbuildable: what SGLang itself fails with on a CPU.
        rest: name and shape of tensors outside MoE layers, for a model that insists on having them
            all.
        raw: whether to look at the tensors as they were loaded, and not to run the layers.
        without: ends of the names of tensors that are left out of the MoE layers.
        packed: whether bytes in its tensors are packed numbers; they are 8-bit floats otherwise.
        draft: the MoE layers of a draft of speculative decoding, named by the ids that SGLang gives
            them.
        numbers: of a draft's layers in plans: those of vLLM's module names.
        offset: added to a layer's number where values are drawn, so that no slot of a draft looks
            like one of the target's.
    """

    architecture: str
    config: dict[str, Any]
    moe: tuple[int, ...] = ()
    block: str = ""
    parts: tuple[Callable[[str, int], Tensors], ...] = ()
    width: int = WIDTH
    biases: bool = False
    remote: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    unbuildable: str = ""
    raw: bool = False
    packed: bool = False
    without: tuple[str, ...] = ()
    draft: Recipe | None = None
    numbers: tuple[int, ...] = ()
    offset: int = 0
    rest: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def name(self) -> str:
        """Return the class and the variant."""
        return f"{self.architecture}-{self.variant}" if self.variant else self.architecture

    def tensors(self) -> Tensors:
        """Return every tensor of the MoE layers, by the checkpoint's names."""
        found: Tensors = {name: drawn(name, *shape) for name, shape in self.rest}
        for layer in self.moe:
            for part in self.parts:
                found |= part(self.block.format(layer=layer), layer + self.offset)
        if self.draft is not None and not self.draft.config:  # it lies in this checkpoint
            found |= self.draft.tensors()
        return {name: tensor for name, tensor in found.items() if not name.endswith(self.without)}

    def padding(self, parameter: str) -> int:
        """Return what the engine fills a parameter up with, where its kernels want it larger.

        No expert has such a value.
        """
        return 0

    def slot(self, layer: int, number: int) -> dict[str, np.ndarray]:
        """Return all values that the slot of an expert should have, by SGLang's parameter.

        They come in any order.
        """
        held = {"w13_weight": ("w1", "w3"), "w2_weight": ("w2",)}
        if self.biases:
            held |= {"w13_weight_bias": ("b1", "b3"), "w2_weight_bias": ("b2",)}
        return {
            parameter: np.concatenate(
                [expert(layer + self.offset, number, t, self.width).ravel() for t in tensors]
            )
            for parameter, tensors in held.items()
        }


def each_expert(
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    path: str = "experts.{expert}.{part}.weight",
    width: int = WIDTH,
):
    """Make a tensor for each part of each expert."""

    def part(block: str, layer: int) -> Tensors:
        names = {"w1": gate, "w3": up, "w2": down}
        return {
            f"{block}.{path.format(expert=e, part=name)}": expert(layer, e, tensor, width)
            for e in range(EXPERTS)
            for tensor, name in names.items()
        }

    return part


def stacked(
    gate_up: str = "experts.gate_up_proj",
    down: str = "experts.down_proj",
    transposed: bool = False,
    interleaved: bool = False,
    biases: bool = False,
    width: int = WIDTH,
):
    """Put all experts of a layer into one tensor, or transposed.

    Shapes: ``[experts, 2 width, hidden]`` and ``[experts, hidden, width]``.

    Args:
        transposed: ``[experts, hidden, 2 width]`` and ``[experts, width, hidden]``.
        interleaved: whether rows of gate and up take turns.
        biases: whether there are ``_bias`` tensors too.
    """

    def joined(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return (
            np.stack([gate, up], 1).reshape(-1, *gate.shape[1:])
            if interleaved
            else np.concatenate([gate, up])
        )

    def part(block: str, layer: int) -> Tensors:
        def of(tensor: str, e: int) -> np.ndarray:
            return expert(layer, e, tensor, width)

        first = np.stack([joined(of("w1", e), of("w3", e)) for e in range(EXPERTS)])
        second = np.stack([of("w2", e) for e in range(EXPERTS)])
        if transposed:
            first, second = (np.ascontiguousarray(t.swapaxes(1, 2)) for t in (first, second))
        found = {f"{block}.{gate_up}": first, f"{block}.{down}": second}
        if biases:
            found[f"{block}.{gate_up}_bias"] = np.stack(
                [joined(of("b1", e), of("b3", e)) for e in range(EXPERTS)]
            )
            found[f"{block}.{down}_bias"] = np.stack([of("b2", e) for e in range(EXPERTS)])
        return found

    return part


def three_stacked(path: str = "{part}.weight", width: int = WIDTH):
    """Put all experts of a layer into one tensor for each part (Step 3)."""

    def part(block: str, layer: int) -> Tensors:
        return {
            f"{block}.{path.format(part=name)}": np.stack(
                [expert(layer, e, tensor, width) for e in range(EXPERTS)]
            )
            for name, tensor in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        }

    return part


def router(name: str = "gate.weight", bias: str | None = None, rows: int = EXPERTS):
    """Make the gate, and the correction bias of its scores."""

    def part(block: str, layer: int) -> Tensors:
        found = {f"{block}.{name}": drawn(f"router {layer}", rows, HIDDEN, gain=3.0)}
        if bias is not None:
            found[f"{block}.{bias}"] = drawn(f"bias {layer}", rows, gain=0.5)
        return found

    return part


def dense(
    path: str,
    width: int = WIDTH,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
):
    """Make shared experts, which are one dense MLP."""

    def part(block: str, layer: int) -> Tensors:
        shapes = ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width))
        return {
            f"{block}.{path}.{name}.weight": drawn(f"{path} {name} {layer}", *shape)
            for name, shape in zip(names, shapes, strict=True)
        }

    return part


def single(path: str, *shape: int):
    """Make one more tensor of an MoE layer."""

    def part(block: str, layer: int) -> Tensors:
        return {f"{block}.{path}": drawn(f"{path} {layer}", *shape)}

    return part


MLP = "model.layers.{layer}.mlp"
ALL = tuple(range(LAYERS))
LATER = tuple(range(1, LAYERS))
BIAS = "gate.e_score_correction_bias"
PER_EXPERT = (each_expert(), router())
SHARED_AND_BIAS = (each_expert(), router(bias=BIAS), dense("shared_experts"))
GROUPED_BAILING = {
    "n_group": 4,
    "topk_group": 2,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "router_dtype": "fp32",
}
QWEN3 = {
    "num_experts": EXPERTS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
