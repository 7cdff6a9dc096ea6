"""Compute a MoE layer as the papers write it: float64, token after token, no exchange."""

from __future__ import annotations

import numpy as np
import torch

from .select import Routing
from .weights import ExpertWeights, SharedExperts


def reference_moe(
    x: torch.Tensor,
    logits: torch.Tensor,
    routing: Routing,
    experts: ExpertWeights,
    shared: SharedExperts | None = None,
) -> torch.Tensor:
    """Compute a MoE layer in float64. Shares no code with the stages.

    Args:
        x: ``[tokens, hidden]``.
        logits: ``[tokens, experts]``.
        routing: the rule.
        experts: of all logical experts, in order.
        shared: shared experts, or None.

    Returns:
        float64 ``[tokens, hidden]`` on CPU.
    """
    x, w13, w2 = _float64(x), _float64(experts.w13), _float64(experts.w2)
    result = np.zeros_like(x)
    for token, scores in enumerate(_float64(logits)):
        chosen, weights = _choose(scores, routing)
        for expert, weight in zip(chosen, weights):
            result[token] += weight * _mlp(x[token], w13[expert], w2[expert])
        if shared is not None:
            value = _mlp(x[token], _float64(shared.w13), _float64(shared.w2))
            scale = 1.0 if shared.gate is None else _sigmoid(_float64(shared.gate)[0] @ x[token])
            result[token] += scale * value
    return torch.from_numpy(result)


def _choose(logits: np.ndarray, routing: Routing) -> tuple[list[int], np.ndarray]:
    """Choose one token's experts, and their weights."""
    scores = (
        _sigmoid(logits)
        if routing.scoring == "sigmoid"
        else np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    )
    biased = (
        scores if routing.correction_bias is None else scores + _float64(routing.correction_bias)
    )
    size = routing.num_experts // routing.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(routing.num_groups)]
    best_of_each = 1 if routing.correction_bias is None else 2
    groups.sort(key=lambda g: -sum(sorted(biased[g], reverse=True)[:best_of_each]))
    candidates = [e for g in groups[: routing.top_groups] for e in g]
    chosen = sorted(candidates, key=lambda e: -biased[e])[: routing.top_k]
    weights = scores[chosen]
    if routing.renormalize:
        weights = weights / weights.sum()
    return chosen, weights * routing.scaling_factor


def _mlp(x: np.ndarray, w13: np.ndarray, w2: np.ndarray) -> np.ndarray:
    gate, up = np.split(w13 @ x, 2)
    return w2 @ (gate * _sigmoid(gate) * up)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _float64(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()
