"""Describe what the zoo needs to know of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.zoo.checkpoint import EXPERTS, HIDDEN, WIDTH, Part


@dataclass(frozen=True)
class Recipe:
    """Describe a tiny checkpoint of an architecture.

    Attributes:
        name: of the recipe: the architecture, and what it is quantized to.
        architecture: as vLLM registers it.
        config: its config.json.
        parts: the tensors of an expert.
        layers: the layers that have experts.
        stored: how a checkpoint stores the experts, in words.
        experts: routed experts of a layer.
        eplb: whether vLLM's EPLB is tried.
        engine: further arguments of the engine.
        owner: only ``RoutedExperts`` whose name holds this are compared.
        draft: architecture of the draft that is loaded instead of the model itself.
        model_experts: routed experts of a layer of the model that a draft is for, where they are
            not as many.
        ranks_differ: why vLLM's own two ranks answer otherwise than one; the reference is then two
            without a placement.
        loaded_only: why to compare as the loader left the slots and go no further: what its kernels
            need.
        planted: have vLLM's loader take expert 0 for expert 2 and the other way round, which the
            zoo must see.
        own_kind: its experts are no ``RoutedExperts``, so that the plugin has to refuse.
        unbuildable: why this vLLM cannot build it on a CPU: a part of its error.
        cause: what its error does not say: whose inability it is, and on what hardware.
        lacks: what vLLM's CPU build lacks of it beside its experts; the zoo stands in for it.
        files: further safetensors files that its loader asks for; they hold nothing.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    layers: tuple[int, ...]
    stored: str
    experts: int = EXPERTS
    eplb: bool = True
    engine: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    own_kind: bool = False
    draft: str = ""
    model_experts: int = 0
    ranks_differ: str = ""
    loaded_only: str = ""
    planted: bool = False
    unbuildable: str = ""
    cause: str = ""
    lacks: str = ""
    files: tuple[str, ...] = ()


V2_RUNNER = "the V2 model runner, which needs Triton"
SPARSE, CUDA_EVENTS = "sparse attention", "CUDA events"
"""What a recipe `Recipe.lacks`."""

NEEDS_AMX, NO_KERNEL = "the kernels need AMX", "vLLM has no CPU kernel for their activation"
"""Why a recipe is `Recipe.loaded_only`."""

NO_PREFIX_CACHING = {"enable_prefix_caching": False}
"""Engine arguments of models with linear attention beside MLA.

On a CPU vLLM chooses blocks for prefix caching, then takes it back.
"""

NO_SPARSE = "Sparse Attention is not supported on CPU"
"""What vLLM says of DeepSeek's sparse attention there."""

OWN_CHECKPOINT = "{checkpoint}"
"""The model of a ``speculative_config`` whose draft stands in the recipe's own checkpoint."""

_OF_RECIPE = (
    "experts",
    "eplb",
    "engine",
    "owner",
    "own_kind",
    "unbuildable",
    "draft",
    "model_experts",
    "ranks_differ",
    "loaded_only",
    "planted",
    "cause",
    "lacks",
    "files",
)


def make(
    architecture: str,
    model_type: str,
    parts: tuple[Part, ...],
    layers: tuple[int, ...] = (0, 1),
    stored: str = "",
    name: str = "",
    **own: Any,
) -> Recipe:
    """Make a recipe from what differs; the config's ``None`` leaves a key of `config` out.

    Args:
        own: keys of the config, and of `Recipe` where it has one of that name.
    """
    of_recipe = {key: own.pop(key) for key in _OF_RECIPE if key in own}
    if not stored:
        stored = _stored(parts)
    values = config(architecture, model_type, **own)
    values = {key: value for key, value in values.items() if value is not None}
    return Recipe(name or architecture, architecture, values, parts, layers, stored, **of_recipe)


def _stored(parts: tuple[Part, ...]) -> str:
    if all("{expert}" in part.name for part in parts):
        last = [part.name.rpartition("{expert}.")[2] for part in parts]
        return f"per expert: {', '.join(last)}"
    last = [part.name.rpartition("{layer}.")[2] for part in parts]
    return f"all experts in one tensor: {', '.join(last)}"


def separate(
    prefix: str = "model.layers.{layer}.mlp.experts.{expert}.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    suffix: str = ".weight",
    hidden: int = HIDDEN,
    width: int = WIDTH,
) -> tuple[Part, ...]:
    """Return a tensor for each expert's gate, up and down projection."""
    gate, up, down = (f"{prefix}{name}{suffix}" for name in names)
    return (
        Part(gate, "w13_weight", (width, hidden)),
        Part(up, "w13_weight", (width, hidden)),
        Part(down, "w2_weight", (hidden, width)),
    )


def stacked(
    prefix: str = "model.layers.{layer}.mlp.experts.",
    names: tuple[str, str] = ("gate_up_proj", "down_proj"),
    transposed: bool = False,
    hidden: int = HIDDEN,
    width: int = WIDTH,
) -> tuple[Part, ...]:
    """Return one tensor for all experts' gate and up projections, one for their down."""
    first, second = (2 * width, hidden), (hidden, width)
    if transposed:
        first, second = first[::-1], second[::-1]
    return (
        Part(f"{prefix}{names[0]}", "w13_weight", first),
        Part(f"{prefix}{names[1]}", "w2_weight", second),
    )


def config(architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    """Return a config.json with what nearly every model has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "moe_intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 128,
    } | own
