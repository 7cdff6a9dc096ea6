"""The four stages: route, gmm_up, gmm_down, unroute.

``route`` is three steps that can be called one by one, which is what chunking does: `select` (no exchange), `plan_dispatch` (who
sends how much to whom, one small exchange for all chunks) and `dispatch` (the tokens themselves).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ...core.errors import PlacementError
from .collectives import EpGroup, add_in_order
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


def route(
    x: torch.Tensor,
    logits: torch.Tensor,
    routing: Routing,
    placed: PlacedExperts,
    group: EpGroup | None = None,
    use_ring: bool = True,
    tokens_per_rank: Sequence[int] | None = None,
    first_token: int = 0,
    dealing: Literal["hash", "turn"] = "hash",
) -> tuple[torch.Tensor, RouteOutput, RouteMetadata]:
    """Choose experts and bring the tokens to them.

    Args:
        x: ``[tokens, hidden]`` of this rank; ranks may have different numbers of tokens, or none.
        logits: ``[tokens, experts]``, the router's.
        routing: the model's rule.
        placed: where this layer's experts lie.
        group: the EP ranks; one rank when None.
        use_ring: all-gather, and later reduce-scatter ("ring of experts": every rank sees all tokens), or all-to-all (a token
            goes once to each rank that holds one of its experts). Neither has a capacity: no token is ever dropped.
        tokens_per_rank: tokens of each rank if the caller knows them; saves the ring its only wait for the device, which a CUDA
            graph needs.
        first_token: see `PlacedExperts.deal`.
        dealing: see `PlacedExperts.deal`.

    Returns:
        ``x [rows, hidden]`` on this rank, what the matmuls need, and what undoes the exchange.

    Raises:
        PlacementError: when shapes, placement and group do not fit together.
    """
    group = group or EpGroup.single()
    check_inputs(x, logits, placed, group)
    selection = select(logits, routing, placed, first_token, dealing)
    known = None if tokens_per_rank is None else [tokens_per_rank]
    (plan,) = plan_dispatch([selection], placed, group, use_ring, known)
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
            f"x {tuple(x.shape)} and logits {tuple(logits.shape)}: they must be [tokens, hidden] and [tokens, experts]"
        )
    if placed.num_ranks != group.size or placed.rank != group.rank:
        raise PlacementError(
            f"a placement's tables for rank {placed.rank} of {placed.num_ranks} on rank {group.rank} of a group of {group.size}: make "
            "them for the rank of this process"
        )


def plan_dispatch(
    selections: Sequence[Selection],
    placed: PlacedExperts,
    group: EpGroup,
    use_ring: bool,
    tokens_per_rank: Sequence[Sequence[int]] | None = None,
) -> list[RouteMetadata]:
    """Who sends how much to whom for each chunk, found with one exchange of numbers for all of them.

    Args:
        selections: one per chunk, the same number on every rank.
        placed: where the experts lie.
        group: the EP ranks.
        use_ring: which exchange.
        tokens_per_rank: ring: ``[chunks][ranks]`` if known, then nothing is exchanged.
    """
    device = selections[0].slots.device
    tokens = [s.slots.shape[0] for s in selections]
    if use_ring:
        if tokens_per_rank is None:
            tokens_per_rank = list(zip(*group.all_gather_ints(tokens, device)))
        elif [counts[group.rank] for counts in tokens_per_rank] != tokens:
            raise PlacementError(
                f"tokens_per_rank {list(tokens_per_rank)} on rank {group.rank} with {tokens} tokens: they must agree"
            )
        return [RouteMetadata(True, n, tuple(counts)) for n, counts in zip(tokens, tokens_per_rank)]

    needed = [_needed_ranks(s, placed) for s in selections]
    if group.size == 1:
        send = [tokens]
    else:
        send = torch.stack([n.sum(dim=0) for n in needed]).tolist()
    table = (
        group.all_gather_ints([c for counts in send for c in counts], device)
        if group.size > 1
        else [tokens]
    )
    plans = []
    for chunk, (selection, mask) in enumerate(zip(selections, needed)):
        sent = table[group.rank][chunk * group.size : (chunk + 1) * group.size]
        received = [row[chunk * group.size + group.rank] for row in table]
        plans.append(_all_to_all_plan(selection, mask, sent, received, placed))
    return plans


def _needed_ranks(selection: Selection, placed: PlacedExperts) -> torch.Tensor:
    """bool ``[tokens, ranks]``: whether the rank holds one of the token's choices."""
    mask = torch.zeros(
        (selection.slots.shape[0], placed.num_ranks),
        dtype=torch.bool,
        device=selection.slots.device,
    )
    return mask.scatter_(1, placed.rank_of_slot[selection.slots], True)


def _all_to_all_plan(
    selection: Selection, mask: torch.Tensor, sent, received, placed: PlacedExperts
) -> RouteMetadata:
    target, token = mask.T.nonzero(as_tuple=True)  # by target rank, then by token
    slots = selection.slots[token]
    there = placed.rank_of_slot[slots] == target[:, None]
    width = min(selection.slots.shape[1], placed.num_ranks)
    return_rows = torch.full((mask.shape[0], width), -1, dtype=torch.int64, device=mask.device)
    nth_of_token = mask.cumsum(dim=1)[token, target] - 1
    return_rows[token, nth_of_token] = torch.arange(token.shape[0], device=mask.device)
    return RouteMetadata(
        False,
        mask.shape[0],
        send_counts=tuple(sent),
        receive_counts=tuple(received),
        sent_tokens=token,
        sent_slots=torch.where(there, placed.slot_on_rank[slots], -1),
        return_rows=return_rows,
    )


def dispatch(
    x: torch.Tensor,
    selection: Selection,
    plan: RouteMetadata,
    placed: PlacedExperts,
    group: EpGroup,
) -> tuple[torch.Tensor, RouteOutput, RouteMetadata]:
    """Bring tokens to their experts as planned. Shapes as in `route`."""
    if plan.use_ring:
        output = gather_selection(selection, plan, placed, group)
        return gather_tokens(x, plan, group), output, plan
    rows = group.all_to_all(x[plan.sent_tokens], plan.send_counts, plan.receive_counts)
    weights = selection.weights[plan.sent_tokens]
    packed = torch.cat([plan.sent_slots, weights.view(torch.int32)], dim=1)
    slots, weights = group.all_to_all(packed, plan.send_counts, plan.receive_counts).chunk(2, dim=1)
    output = keep_local(
        slots, weights.contiguous().view(torch.float32), placed.num_local, group.size == 1
    )
    return rows, output, plan


def gather_tokens(
    x: torch.Tensor, plan: RouteMetadata, group: EpGroup, others: bool = False
) -> torch.Tensor:
    """Ring: ``[tokens, columns]`` of every rank, or of every other rank, to ``[ranks * max tokens, columns]``."""
    return (group.gather_others if others else group.all_gather)(
        _padded(x, max(plan.tokens_per_rank), 0)
    )


def gather_selection(
    selection: Selection,
    plan: RouteMetadata,
    placed: PlacedExperts,
    group: EpGroup,
    others: bool = False,
) -> RouteOutput:
    """Ring: every rank's choices, or every other rank's, filtered to this rank's slots."""
    most = max(plan.tokens_per_rank)
    slots = _padded(selection.slots.int(), most, placed.num_slots)
    packed = torch.cat([slots, _padded(selection.weights, most, 0).view(torch.int32)], dim=1)
    slots, weights = (group.gather_others if others else group.all_gather)(packed).chunk(2, dim=1)
    # The extra entry of the table, -1, is for padding rows.
    return keep_local(
        placed.local_slot[slots],
        weights.contiguous().view(torch.float32),
        placed.num_local,
        group.size == 1,
    )


def _padded(x: torch.Tensor, rows: int, value: int) -> torch.Tensor:
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), value)])


def keep_local(
    local_slots: torch.Tensor, weights: torch.Tensor, num_local: int, complete: bool
) -> RouteOutput:
    """Filter group sizes, slots and weights to one rank in one place, so that they cannot disagree.

    MaxText's ring of experts filtered the group sizes alone, and everything indexed like them was read at the wrong
    expert (review of PR 3981).
    """
    local_slots = local_slots.int().contiguous()
    buckets = local_slots
    if not complete:
        elsewhere = local_slots < 0
        buckets = local_slots.masked_fill(elsewhere, num_local)
        weights = weights.masked_fill(elsewhere, 0)
    # Entries of other ranks are counted in the last bucket, which is cut off.
    sizes = torch.zeros(num_local + 1, dtype=torch.int64, device=local_slots.device)
    flat = buckets.flatten().long()
    sizes.scatter_add_(0, flat, torch.ones_like(flat))
    return RouteOutput(sizes[:num_local], local_slots, buckets, weights.contiguous(), complete)


def gmm_up(
    x: torch.Tensor,
    output: RouteOutput,
    weights: ExpertWeights,
    matmuls: Matmuls,
    into: ExpertHidden | None = None,
) -> ExpertHidden:
    """Gate and up projection of every assignment, and SwiGLU.

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
            f"x of {x.shape[0]} rows and weights of {weights.w13.shape[0]} slots for {output.num_rows} rows and {output.num_slots} "
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
    """Down projection, times the router weights, summed over the choices that lie on this rank.

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
            f"{hidden.columns} of {weights.hidden_size} columns have been multiplied: call gmm_up with the others first"
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
    """Each token's rows ``[rows sent, columns]`` added in ascending order of rank, ``[tokens, columns]``."""
    if not returned.shape[0]:
        return returned.new_zeros((return_rows.shape[0], returned.shape[1]))
    return add_in_order(
        [
            torch.where((rows >= 0)[:, None], returned[rows.clamp_min(0)], 0)
            for rows in return_rows.unbind(1)
        ]
    )
