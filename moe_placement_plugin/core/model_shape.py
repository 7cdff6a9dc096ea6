"""Find out which layers of a model are MoE layers, from its Hugging Face config.

The conventions differ by model family; each is named beside the attribute it reads. Whatever is
read here is checked again when the engine builds the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import PlacementError

_NUM_EXPERTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "num_moe_experts",
    "num_routed_experts",
)
_NUM_GROUPS = ("n_group", "num_expert_group", "n_groups")


@dataclass(frozen=True)
class ModelShape:
    """Describe the MoE layers of a model.

    Attributes:
        layer_ids: index of each MoE layer within the model, ``[layers]``.
        num_experts: logical experts per MoE layer.
        num_groups: expert groups of grouped top-k routing, 1 when the model has none.
        name: what the user called the model.
        draft: the draft of speculative decoding, where the engine runs one with experts and places
            it by rows of its own in a plan; which of its layers are MoE layers need not be known.
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    num_groups: int = 1
    name: str = ""
    draft: ModelShape | None = None


def _first(config: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return max(value) if isinstance(value, (list, tuple)) else value
    return None


def num_experts_of(config: Any) -> int:
    """Count the logical routed experts of an MoE layer; 0 for a dense model."""
    return int(_first(config, _NUM_EXPERTS) or 0)


def moe_layer_ids(config: Any) -> tuple[int, ...]:
    """List the indices of the MoE layers among ``num_hidden_layers``, ``[MoE layers]``."""
    if getattr(config, "zero_expert_num", None) is not None and hasattr(config, "num_layers"):
        # LongCat-Flash counts the two attentions of each layer as layers, LongCat-Flash-Lite
        # counts no others.
        layers = range(config.num_layers)
    else:
        layers = range(config.num_hidden_layers)
    shared = getattr(config, "num_blocks", None)
    if isinstance(shared, int):
        # Intern-S2-Mobius: experts that several layers share, numbered by themselves.
        return tuple(range(shared))
    explicit = getattr(config, "moe_layers", None)
    if isinstance(explicit, (list, tuple)):  # Llama 4
        return tuple(explicit)
    enumerated = getattr(config, "moe_layers_enum", None)
    if isinstance(enumerated, str):  # Step 3
        return tuple(int(i) for i in enumerated.split(","))
    frequency = getattr(config, "moe_layer_freq", None)
    if isinstance(frequency, (list, tuple)):  # MiMo: one flag per layer
        return tuple(i for i in layers if frequency[i])
    kinds = getattr(config, "mlp_layer_types", None)
    if isinstance(kinds, (list, tuple)):  # Laguna, Inkling, HY: "dense" or "sparse" for each layer
        return tuple(i for i in layers if i < len(kinds) and kinds[i] == "sparse")
    blocks = getattr(config, "layers_block_type", None)
    if isinstance(blocks, (list, tuple)) and "moe" in blocks:  # Nemotron-H
        return tuple(i for i in layers if i < len(blocks) and blocks[i] == "moe")
    for name in ("num_dense_layers", "dense_mlp_idx"):  # AFM and LFM-2, Inkling
        first = getattr(config, name, None)
        if isinstance(first, int):
            return tuple(i for i in layers if i >= first)
    if getattr(config, "first_k_dense_replace", None) is not None:  # DeepSeek, GLM-4, Kimi
        first, step = config.first_k_dense_replace, frequency or 1
        return tuple(i for i in layers if i >= first and i % step == 0)
    if getattr(config, "decoder_sparse_step", None) is not None:  # Qwen2 and Qwen3 MoE, Qwen3-Next
        dense = set(getattr(config, "mlp_only_layers", None) or ())
        return tuple(
            i for i in layers if i not in dense and (i + 1) % config.decoder_sparse_step == 0
        )
    if getattr(config, "expert_layer_period", None) is not None:  # Jamba
        return tuple(
            i for i in layers if i % config.expert_layer_period == (config.expert_layer_offset or 0)
        )
    start = getattr(config, "moe_layer_start_index", None)
    if start is not None:  # ERNIE 4.5
        start = min(start) if isinstance(start, (list, tuple)) else start
        end = getattr(config, "moe_layer_end_index", None)
        end = max(end) if isinstance(end, (list, tuple)) else end
        last = len(layers) - 1 if end is None or end < 0 else end
        interval = getattr(config, "moe_layer_interval", None) or 1
        return tuple(i for i in layers if start <= i <= last and (i + 1) % interval == 0)
    skipped = getattr(config, "moe_layer_num_skipped", None)
    if skipped is not None:  # Hunyuan
        return tuple(i for i in layers if i >= skipped)
    return tuple(layers)


def model_shape(config: Any, name: str, num_experts: int | None = None) -> ModelShape:
    """Describe the MoE layers of the model with (text) config ``config``.

    Args:
        config: the Hugging Face config of the text model.
        name: what the user called the model.
        num_experts: logical experts as the engine counts them, if it does.

    Raises:
        PlacementError: when the model has no experts.
    """
    experts = num_experts if num_experts is not None else num_experts_of(config)
    layers = moe_layer_ids(config) if experts else ()
    if not experts or not layers:
        raise PlacementError(
            f"{name} is no Mixture-of-Experts model: it has no experts to place; leave "
            "--expert-placement-strategy out"
        )
    groups = _first(config, _NUM_GROUPS)
    return ModelShape(
        layer_ids=layers, num_experts=int(experts), num_groups=int(groups or 1), name=name
    )
