"""Compare a loaded model's expert slots with the checkpoint's experts.

What its MoE layers answer is compared too.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from . import checkpoints
from .recipe import Recipe
from .values import EXPERTS, drawn
from .worker import TOKENS, Loaded


def examine(model: Any, recipe: Recipe, placement: str, rank: int, ranks: int) -> Loaded:
    """Compare every slot of this rank, and run every MoE layer.

    Args:
        model: the loaded model.
        recipe: what its checkpoint was made by.
        placement: see `checkpoints.slots`; or ``own order``, SGLang's, for a draft.
        rank: EP rank.
        ranks: EP ranks.
    """
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    found = Loaded()
    rows = {} if placement == "own order" else checkpoints.slots(recipe, placement)
    seen = set()
    for name, block in model.named_modules():
        layers = [child for child in block.children() if isinstance(child, FusedMoE)]
        if not layers:
            continue
        (layer,) = layers
        seen.add(layer.layer_id)
        found.dtype = str(layer.w13_weight.dtype).removeprefix("torch.")
        row = rows.get(layer.layer_id) or own_order(layer._num_global_routed, ranks)
        size = len(row) // ranks
        mine = row[rank * size : (rank + 1) * size]
        found.wrong += [f"{name} {wrong}" for wrong in _compare(layer, recipe, mine, found)]
        if recipe.raw:
            continue
        routers = [child for child in block.children() if isinstance(child, TopK)]
        with get_global_expert_distribution_recorder().with_current_layer(layer.layer_id):
            if routers:
                found.outputs[layer.layer_id] = _routed(layer, routers[0]).float().numpy()
            answer = _block(block, layer.hidden_size, layer.w13_weight.dtype)
            if answer is not None:
                found.blocks[layer.layer_id] = answer.float().numpy()
    if seen != set(recipe.moe):
        found.wrong.append(
            f"the model has MoE layers {sorted(seen)}, its checkpoint {list(recipe.moe)}"
        )
    return found


def own_order(slots: int, ranks: int) -> list[int]:
    """Put expert e in slot e; what is left repeats the first expert of its rank."""
    size = slots // ranks
    return [slot if slot < EXPERTS else slot - slot % size for slot in range(slots)]


def _compare(layer: Any, recipe: Recipe, mine: list[int], found: Loaded) -> list[str]:
    wrong = []
    experts = [recipe.slot(layer.layer_id, expert) for expert in range(EXPERTS)]
    for tensor in experts[0]:
        held = getattr(layer, tensor).data
        if len(held) != len(mine):
            wrong.append(f"layer {layer.layer_id}: {tensor} has {len(held)} slots, not {len(mine)}")
            continue
        found.tensors = sorted({*found.tensors, tensor})
        # Biases are widened once they have been loaded with the weights' own precision.
        dtypes = [held.dtype]
        if tensor.endswith("bias") and layer.w13_weight.is_floating_point():
            dtypes.insert(0, layer.w13_weight.dtype)
        padding = recipe.padding(tensor)
        signatures = [
            signature(bytes_of(_kept(expert[tensor], dtypes)), padding) for expert in experts
        ]
        for slot, wanted in enumerate(mine):
            found.slots += 1
            here = signature(bytes_of(held[slot]), padding)
            if not np.array_equal(here, signatures[wanted]):
                others = [e for e in range(EXPERTS) if np.array_equal(here, signatures[e])]
                wrong.append(
                    f"layer {layer.layer_id} slot {slot}: {tensor} is not expert {wanted}'s but "
                    f"{others or 'no expert'}'s"
                )
    return wrong


def _kept(values: np.ndarray, dtypes: list[torch.dtype]) -> torch.Tensor:
    """Return values as the engine keeps them: rounded where it keeps fewer bits."""
    tensor = torch.from_numpy(values)
    for dtype in dtypes if tensor.is_floating_point() else ():
        tensor = tensor.to(dtype)
    return tensor


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as numpy has it: 8-bit floats as bytes, bfloat16 as float32."""
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float8_e5m2):
        tensor = tensor.view(torch.uint8)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def signature(values: np.ndarray, padding: int = 0) -> np.ndarray:
    """Return the values other than the padding, sorted: no two experts have the same.

    Layouts and padding are the engine's own affair.
    """
    flat = np.asarray(values).ravel()
    return np.sort(flat[flat != padding])


def _tokens(hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(drawn("tokens", TOKENS, hidden, gain=8.0)).to(dtype)


def _routed(layer: Any, router: Any) -> torch.Tensor:
    """Return this rank's part of the routed experts' output.

    It is that of logits that are the same everywhere, ``[tokens, experts]``.
    """
    logits = torch.from_numpy(drawn("logits", TOKENS, EXPERTS, gain=6.0))
    tokens = _tokens(layer.hidden_size, layer.w13_weight.dtype)
    config = router.topk_config
    before = layer.reduce_results, config.apply_routed_scaling_factor_on_output
    layer.reduce_results = False
    config.apply_routed_scaling_factor_on_output = (
        False  # the torch-native router has no such thing
    )
    try:
        return layer(tokens.clone(), router(tokens, logits))
    finally:
        layer.reduce_results, config.apply_routed_scaling_factor_on_output = before


def _block(block: Any, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the whole MoE block's output; None for one that wants more than hidden states."""
    parameters = list(inspect.signature(block.forward).parameters.values())
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if [p.name for p in needed] != ["hidden_states"]:
        return None
    try:
        answer = block(_tokens(hidden, dtype))
    # A kernel without a CPU build; stock's rank must fail alike, see `test_zoo`.
    except Exception:  # noqa: BLE001
        return None
    return answer if isinstance(answer, torch.Tensor) else None
