"""While loading: models that take rows of a tensor of all experts by position get them in the order
of the placement.

gpt-oss copies a block of consecutive rows to a rank, Llama 4 the rows of the rank's experts in
ascending order. Their weights are
looked through before the model sees them: `rows_in_order` gives a tensor of all experts either one
    expert at a time, where the
model can take it so, or with its rows permuted, so that what is copied is what the map wants. That
it was is proven afterwards (`evidence`): a model that changes its ways is refused, not served
wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ...core.errors import PlacementError
from .evidence import EVIDENCE, IN_ORDER, MEND
from .layers import layer_id_of, num_logical, routed_layers, slot_experts
from .reload import enter_update
from .reload_table import FIRST_COPIES

PICKS = {"GptOssModel": "block", "Llama4Model": "ascending"}
"""Class of a model, or of a base of it -> which rows of a stacked tensor it copies to a rank."""

BRINGS_NO_REPLICAS = ("Step3p5Model",)
"""Models that count logical experts while they load, under EPLB too: their replicas are filled from
the first copies.
"""

_STACKED = re.compile(r"(?:^|\.)experts\.(?!\d+\.)(?P<rest>(?!.*correction_bias)[^.]+(?:\.\w+)?)$")
_SPLITS = "_try_load_streamed_expert"
"""Method of a gpt-oss that takes one expert at a time too (vLLM 0.32 and later)."""


def follow(model: Any) -> None:
    """Look through all weights that a model is given from now on, when it starts and while it
    serves.

    Args:
        model: a model with its parameters, before its weights are loaded.
    """
    layers = routed_layers(model)
    if not layers or "load_weights" in vars(model):
        return
    original, picks, splits = model.load_weights, _picks(model), _splits(model)
    for name in _brings_no_replicas(model):
        object.__setattr__(layers[name], FIRST_COPIES, True)
    for name, how in picks.items():
        object.__setattr__(layers[name], IN_ORDER, how)

    def load_weights(weights, *args, **kwargs):
        serving = enter_update(model)
        loaded = original(rows_in_order(weights, layers, picks, splits), *args, **kwargs)
        if not serving:
            for layer in layers.values():
                if evidence := getattr(layer, EVIDENCE, None):
                    evidence.settle(layer)
        return loaded

    object.__setattr__(model, "load_weights", load_weights)


def _picks(model: Any) -> dict[str, str]:
    """Layer name -> how its model picks rows; no entry where that is not known."""
    found: dict[str, str] = {}
    for module in model.modules():
        kind = next((PICKS[c.__name__] for c in type(module).__mro__ if c.__name__ in PICKS), None)
        if kind is not None:
            found |= dict.fromkeys(routed_layers(module), kind)
    return found


def _brings_no_replicas(model: Any) -> set[str]:
    """Names of the layers whose replicas no weight arrives for."""
    found: set[str] = set()
    for module in model.modules():
        if any(c.__name__ in BRINGS_NO_REPLICAS for c in type(module).__mro__):
            found.update(routed_layers(module))
    return found


def _splits(model: Any) -> frozenset[str]:
    """Names of the layers whose model takes an expert at a time under the name of a stacked tensor
    with the expert's number in it.
    """
    found: set[str] = set()
    for module in model.modules():
        if hasattr(module, _SPLITS):
            quantized = getattr(module.config, "quantization_config", None) or {}
            if quantized.get("quant_method") != "quark":
                found.update(routed_layers(module))
    return frozenset(found)


def stacked_layer(name: str, tensor: Any, layers: dict[str, Any]) -> Any:
    """The layer that a tensor of the checkpoint holds all experts of; None for any other tensor."""
    import torch

    if not _STACKED.search(name) or not isinstance(tensor, torch.Tensor) or not tensor.dim():
        return None
    layer_id = layer_id_of(name)
    found = [
        layer
        for key, layer in layers.items()
        if layer_id is not None and layer_id_of(key) == layer_id
    ]
    return found[0] if len(found) == 1 and num_logical(found[0]) == tensor.shape[0] else None


def rows_in_order(
    weights: Iterable[tuple[str, Any]],
    layers: dict[str, Any],
    picks: dict[str, str],
    splits: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Any]]:
    """The weights of a checkpoint, those of all experts of a layer at once in the order in which
    the model will copy them.

    Args:
        weights: (name, tensor) as the model takes them.
        layers: name -> ``RoutedExperts``.
        picks: name of a layer -> how its model picks rows, see `PICKS`.
        splits: names of the layers whose model takes one expert at a time.

    Raises:
        PlacementError: for a placement that rows cannot be permuted for.
    """
    for name, tensor in weights:
        layer = stacked_layer(name, tensor, layers)
        if layer is None:
            yield name, tensor
        elif layer.layer_name in splits:
            head, _, rest = name.rpartition("experts.")
            for expert in dict.fromkeys(slot_experts(layer).tolist()):
                if 0 <= expert < tensor.shape[0]:
                    yield f"{head}experts.{expert}.{rest}", tensor[expert]
        else:
            evidence = getattr(layer, EVIDENCE, None)
            how = picks.get(layer.layer_name)
            if how is not None and evidence is not None and evidence.moved:
                evidence.saw(layer, name, tensor)
            yield name, permuted(layer, name, tensor, how)


def permuted(layer: Any, name: str, tensor: Any, picks: str | None) -> Any:
    """A tensor ``[experts, ...]`` with the rows of this rank's experts where its model will look
    for them.

    Rows that this rank's model does not copy hold nothing in particular.

    Args:
        layer: a ``RoutedExperts``.
        name: of the tensor.
        tensor: a checkpoint's.
        picks: ``block``: the rank's part of the experts in equal parts; ``ascending``: the rows
            that the expert map has here, in ascending order; None leaves the tensor as it is.

    Raises:
        PlacementError: for ranks with unequal numbers of experts and a model that wants equal ones.
    """
    if picks is None:
        return tensor
    manager, experts = layer.expert_map_manager, slot_experts(layer)
    if picks == "block":
        slots, rest = divmod(tensor.shape[0], manager.ep_size)
        if rest or experts.size != slots:
            raise PlacementError(
                f"{layer.layer_name}: {name} is copied in {manager.ep_size} equal parts by its "
                f"model, and EP rank {manager.ep_rank} holds "
                f"{experts.size} of {tensor.shape[0]} experts: use a placement with the same "
                "number on every rank (zigzag), or leave the "
                "placement flag out"
            )
        rows = np.arange(manager.ep_rank * slots, (manager.ep_rank + 1) * slots)
    else:
        rows = np.flatnonzero(manager.expert_map.cpu().numpy() >= 0)
        if rows.size != experts.size:
            raise PlacementError(
                f"{layer.layer_name}: {name} cannot be loaded beside fused shared experts: {MEND}"
            )
    if np.array_equal(rows, experts):
        return tensor
    into = tensor.new_empty((max(tensor.shape[0], manager.global_num_experts), *tensor.shape[1:]))
    for row, expert in zip(rows.tolist(), experts.tolist()):
        into[row] = tensor[expert]
    return into
