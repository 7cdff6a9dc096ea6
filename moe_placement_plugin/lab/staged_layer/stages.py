"""Compute the four stages: route, gmm_up, gmm_down, unroute.

``route`` is three steps that can be called one by one, which is what chunking does: `select` (no
exchange), `plan_dispatch` (who sends how much to whom, one small exchange for all chunks) and
`dispatch` (the tokens themselves).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...core.errors import PlacementError
from .collectives import EpGroup, add_in_order
from .dispatching import dispatch, plan_dispatch
from .matmuls.base import Matmuls
from .placed import PlacedExperts
from .results import ExpertHidden, RouteMetadata, RouteOutput, Selection
from .select import Routing, select_experts
from .weights import ExpertWeights


def select(
    logits: torch.Tensor,
    routing: Routing,
    placed: PlacedExperts,
    first_token: int = 0,
    dealing: Literal["hash", "turn"] = "hash",
) -> Selection:
    """Choose experts, and the slots that serve them. Shapes as in `route`."""
    experts, weights = select_experts(logits, routing)
    return Selection(experts, placed.deal(experts, first_token, dealing), weights)


@dataclass(frozen=True)
class EpExchange:
    """Say how the EP ranks exchange tokens. Neither way has a capacity: no token is ever dropped.

    Attributes:
        group: the EP ranks; one rank when None.
        use_ring: all-gather, and later reduce-scatter ("ring of experts": every rank sees all
            tokens), or all-to-all (a token goes once to each rank that holds one of its experts).
        tokens_per_rank: tokens of each rank if the caller knows them; saves the ring its only wait
            for the device, which a CUDA graph needs.
    """

    group: EpGroup | None = None
    use_ring: bool = True
    tokens_per_rank: Sequence[int] | None = None


def route(
    x: torch.Tensor,
    logits: torch.Tensor,
    routing: Routing,
    placed: PlacedExperts,
    exchange: EpExchange = EpExchange(),
    first_token: int = 0,
    dealing: Literal["hash", "turn"] = "hash",
) -> tuple[torch.Tensor, RouteOutput, RouteMetadata]:
    """Choose experts and bring the tokens to them.

    Args:
        x: ``[tokens, hidden]`` of this rank; ranks may have different numbers of tokens, or none.
        logits: ``[tokens, experts]``, the router's.
        routing: the model's rule.
        placed: where this layer's experts lie.
        exchange: how tokens get to other ranks.
        first_token: see `PlacedExperts.deal`.
        dealing: see `PlacedExperts.deal`.

    Returns:
        ``x [rows, hidden]`` on this rank, what the matmuls need, and what undoes the exchange.

    Raises:
        PlacementError: when shapes, placement and group do not fit together.
    """
    group = exchange.group or EpGroup.single()
    check_inputs(x, logits, placed, group)
    selection = select(logits, routing, placed, first_token, dealing)
    known = None if exchange.tokens_per_rank is None else [exchange.tokens_per_rank]
    (plan,) = plan_dispatch([selection], placed, group, exchange.use_ring, known)
    return dispatch(x, selection, plan, placed, group)


def check_inputs(
    x: torch.Tensor, logits: torch.Tensor, placed: PlacedExperts, group: EpGroup
) -> None:
    """Refuse what `route` cannot take.

    Raises:
        PlacementError: when shapes, tables and group do not belong together.
    """
    if x.dim() != 2 or logits.shape[0] != x.shape[0]:
        raise PlacementError(
            f"x {tuple(x.shape)} and logits {tuple(logits.shape)}: they must be [tokens, hidden] "
            "and [tokens, experts]"
        )
    if placed.num_ranks != group.size or placed.rank != group.rank:
        raise PlacementError(
            f"a placement's tables for rank {placed.rank} of {placed.num_ranks} on rank "
            f"{group.rank} of a group of {group.size}: make "
            "them for the rank of this process"
        )


def gmm_up(
    x: torch.Tensor,
    output: RouteOutput,
    weights: ExpertWeights,
    matmuls: Matmuls,
    into: ExpertHidden | None = None,
) -> ExpertHidden:
    """Compute gate and up projection of every assignment, and SwiGLU.

    Args:
        x: ``[rows, hidden]``, or the next columns of the embedding, ``[rows, columns]``.
        output: from `route`.
        weights: of this rank's slots.
        matmuls: who multiplies.
        into: result of the call with the columns before these; None for the first ones.

    Raises:
        PlacementError: when the shapes do not fit together.
    """
    if x.shape[0] != output.num_rows or weights.w13.shape[0] != output.num_slots:
        raise PlacementError(
            f"x of {x.shape[0]} rows and weights of {weights.w13.shape[0]} slots for "
            f"{output.num_rows} rows and {output.num_slots} "
            "slots: give what route returned and the weights of this rank's slots"
        )
    start = into.columns if into else 0
    stop = start + x.shape[1]
    if stop > weights.hidden_size:
        raise PlacementError(
            f"x has {stop} columns in all, the weights {weights.hidden_size}: they must agree"
        )
    plan = into.plan if into else matmuls.plan(x, output, weights)
    if x.shape[1] == weights.hidden_size:
        return ExpertHidden(
            matmuls.activate(matmuls.up(x, output, plan, weights.w13), x.dtype), plan, stop
        )
    sums = matmuls.up_columns(
        x, output, plan, weights.w13[:, :, start:stop], into.values if into else None
    )
    if stop == weights.hidden_size:
        sums = matmuls.activate(sums, x.dtype)
    return ExpertHidden(sums, plan, stop)


def gmm_down(
    hidden: ExpertHidden,
    output: RouteOutput,
    weights: ExpertWeights,
    matmuls: Matmuls,
    start: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """Compute the down projection, weighted, summed over the choices that lie on this rank.

    Args:
        hidden: from `gmm_up`, all columns multiplied.
        output: from `route`.
        weights: of this rank's slots.
        matmuls: the same as for `gmm_up`.
        start: first column of the embedding that is wanted.
        stop: end of them; the hidden size when None.

    Returns:
        ``[rows, stop - start]``, partial sums: the other ranks have the rest.
    """
    if hidden.columns != weights.hidden_size:
        raise PlacementError(
            f"{hidden.columns} of {weights.hidden_size} columns have been multiplied: call gmm_up "
            "with the others first"
        )
    return matmuls.down(hidden.values, output, hidden.plan, weights.w2[:, start:stop])


def unroute(
    partial: torch.Tensor,
    metadata: RouteMetadata,
    group: EpGroup | None = None,
    shared: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bring the partial sums back to the tokens' ranks and add them up.

    Args:
        partial: ``[rows, columns]`` from `gmm_down`.
        metadata: from `route`.
        group: the EP ranks, as for `route`.
        shared: ``[tokens, columns]`` of the shared experts, added if given.

    Returns:
        ``[tokens, columns]``.
    """
    group = group or EpGroup.single()
    if metadata.use_ring:
        result = group.reduce_scatter(partial)[: metadata.num_tokens]
    else:
        returned = group.all_to_all(partial, metadata.receive_counts, metadata.send_counts)
        result = return_all_to_all(returned, metadata.return_rows) if group.size > 1 else returned
    return result if shared is None else result + shared


def return_all_to_all(returned: torch.Tensor, return_rows: torch.Tensor) -> torch.Tensor:
    """Add each token's rows ``[rows sent, columns]`` in ascending order of rank.

    Shape: ``[tokens, columns]``.
    """
    if not returned.shape[0]:
        return returned.new_zeros((return_rows.shape[0], returned.shape[1]))
    return add_in_order(
        [
            torch.where((rows >= 0)[:, None], returned[rows.clamp_min(0)], 0)
            for rows in return_rows.unbind(1)
        ]
    )
