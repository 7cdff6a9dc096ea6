"""Choose which experts a token goes to and with which weight.

It does so as the routers of the models that both engines serve.

Semantics of vLLM's ``grouped_topk`` / ``fused_topk_bias`` and SGLang's ``biased_grouped_topk_impl``
and their likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...core.errors import PlacementError


@dataclass(frozen=True, eq=False)
class Routing:
    """Describe a model's routing rule.

    Attributes:
        num_experts: logical experts.
        top_k: experts per token.
        scoring: ``"softmax"`` or ``"sigmoid"`` of the logits.
        renormalize: divide the weights of the chosen experts by their sum.
        num_groups: expert groups; 1 for none.
        top_groups: groups that a token may choose from.
        scaling_factor: multiplies the weights (``routed_scaling_factor``).
        correction_bias: float32 ``[experts]``, added to the scores for the choice but not to the
            weights; None for none. With it a group counts by the sum of its two best scores,
            without by its best one.

    Raises:
        PlacementError: when the numbers do not fit together.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scaling_factor: float = 1.0
    correction_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise PlacementError(f"scoring {self.scoring!r}: choose softmax or sigmoid")
        if (
            self.num_groups < 1
            or self.num_experts % self.num_groups
            or not 1 <= self.top_groups <= self.num_groups
        ):
            raise PlacementError(
                f"{self.top_groups} of {self.num_groups} groups for {self.num_experts} experts: "
                "the groups must divide the experts, "
                "and a token chooses from 1 up to all of them"
            )
        reachable = self.num_experts // self.num_groups * self.top_groups
        if not 1 <= self.top_k <= reachable:
            raise PlacementError(
                f"top_k {self.top_k}: a token can choose 1 to {reachable} experts here"
            )
        if self.correction_bias is not None and self.correction_bias.shape != (self.num_experts,):
            raise PlacementError(
                f"correction_bias of shape {tuple(self.correction_bias.shape)}: it must be "
                f"[{self.num_experts}]"
            )


def select_experts(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and weights of every token.

    Args:
        logits: ``[tokens, experts]``, of any floating type; scored in float32.
        routing: the rule.

    Returns:
        int64 experts ``[tokens, top_k]`` and float32 weights ``[tokens, top_k]``, best first.

    Raises:
        PlacementError: when the logits have another number of experts.
    """
    if logits.dim() != 2 or logits.shape[1] != routing.num_experts:
        raise PlacementError(
            f"logits of shape {tuple(logits.shape)}: they must be [tokens, {routing.num_experts}]"
        )
    logits = logits.float()
    scores = (
        torch.softmax(logits, dim=-1) if routing.scoring == "softmax" else torch.sigmoid(logits)
    )
    choice = scores if routing.correction_bias is None else scores + routing.correction_bias
    if routing.num_groups > 1:
        choice = _best_groups_only(choice, routing)
    # Sorted, so that equal logits give equal tokens whatever else is in the batch.
    experts = torch.topk(choice, routing.top_k, dim=-1, sorted=True).indices
    weights = scores.gather(1, experts)
    if routing.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if routing.scaling_factor != 1.0:
        weights = weights * routing.scaling_factor
    return experts, weights


def _best_groups_only(choice: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return scores ``[tokens, experts]`` with -inf in the groups that are out of reach.

    A token may not choose from those.
    """
    grouped = choice.view(choice.shape[0], routing.num_groups, -1)
    if routing.correction_bias is None or grouped.shape[-1] == 1:
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(routing.top_groups, dim=-1, sorted=False).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
