"""Plan who sends which tokens to whom, and bring them there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core.errors import PlacementError
from .collectives import EpGroup
from .placed import PlacedExperts
from .results import RouteMetadata, RouteOutput, Selection


def plan_dispatch(
    selections: Sequence[Selection],
    placed: PlacedExperts,
    group: EpGroup,
    use_ring: bool,
    tokens_per_rank: Sequence[Sequence[int]] | None = None,
) -> list[RouteMetadata]:
    """Plan who sends how much to whom for each chunk, with one exchange of numbers for all.

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
                f"tokens_per_rank {list(tokens_per_rank)} on rank {group.rank} with {tokens} "
                "tokens: they must agree"
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
    """Return whether each rank holds one of a token's choices, bool ``[tokens, ranks]``."""
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
    """Gather every rank's tokens over the ring, or every other rank's.

    Shapes: ``[tokens, columns]`` to ``[ranks * max tokens, columns]``.
    """
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
    """Gather every rank's choices over the ring, or every other rank's, filtered to this rank."""
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

    MaxText's ring of experts filtered the group sizes alone, and everything indexed like them was
    read at the wrong expert (review of PR 3981).
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
