"""Compute a rank's own tokens while the others' come, and while the others' results go.

They need no exchange.

    rank 0:  gate, up: own | gate, up: others' | down: others' | down: own | add up
    links:   tokens come .                                       sums go .

Two pieces of computation hide both exchanges, where chunks of tokens leave the first chunk's tokens
and the last one's sums exposed and divide every expert's rows into as many pieces as there are
chunks, each with a last tile that is not full.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .collectives import EpGroup, add_in_order
from .dispatching import dispatch, gather_selection, gather_tokens, keep_local
from .placed import PlacedExperts
from .results import RouteMetadata, RouteOutput, Selection
from .stages import return_all_to_all


def own_rows(
    x: torch.Tensor, selection: Selection, plan: RouteMetadata, placed: PlacedExperts
) -> tuple[torch.Tensor, RouteOutput]:
    """Return this rank's tokens that chose one of its experts, and what the matmuls need.

    With the ring these are all its tokens.

    Args:
        x: ``[tokens, hidden]``.
        selection: of these tokens.
        plan: from `plan_dispatch`.
        placed: where the experts lie.

    Returns:
        ``[own rows, hidden]`` and the filtered choices.
    """
    if plan.use_ring:
        return x, keep_local(
            placed.local_slot[selection.slots], selection.weights, placed.num_local, False
        )
    assert plan.sent_tokens is not None and plan.sent_slots is not None, "an all-to-all sends both"
    start, stop = _own_segment(plan.send_counts, placed.rank)
    tokens = plan.sent_tokens[start:stop]
    return x[tokens], keep_local(
        plan.sent_slots[start:stop], selection.weights[tokens], placed.num_local, False
    )


def bring_others(
    x: torch.Tensor,
    selection: Selection,
    plan: RouteMetadata,
    placed: PlacedExperts,
    group: EpGroup,
) -> tuple[torch.Tensor, RouteOutput]:
    """Bring the other ranks' tokens, in order of rank. Shapes as in `own_rows`."""
    if plan.use_ring:
        output = gather_selection(selection, plan, placed, group, others=True)
        return gather_tokens(x, plan, group, others=True), output
    start, stop = _own_segment(plan.send_counts, placed.rank)
    without_own = replace(
        plan,
        send_counts=tuple(_zero_at(plan.send_counts, placed.rank)),
        receive_counts=tuple(_zero_at(plan.receive_counts, placed.rank)),
        sent_tokens=_without(plan.sent_tokens, start, stop),
        sent_slots=_without(plan.sent_slots, start, stop),
    )
    return dispatch(x, selection, without_own, placed, group)[:2]


def return_others(partial: torch.Tensor, plan: RouteMetadata, group: EpGroup) -> torch.Tensor:
    """Send the others their sums, ``[others' rows, hidden]``.

    Returns what they send for this rank's tokens, in order of rank.
    """
    if plan.use_ring:
        rows = _zero_at([max(plan.tokens_per_rank)] * group.size, group.rank)
        return group.all_to_all(partial, rows, rows)
    return group.all_to_all(
        partial, _zero_at(plan.receive_counts, group.rank), _zero_at(plan.send_counts, group.rank)
    )


def add_own(
    returned: torch.Tensor, own: torch.Tensor, plan: RouteMetadata, group: EpGroup
) -> torch.Tensor:
    """Add each token's sums up in ascending order of rank, as `unroute` does.

    Shape: ``[tokens, columns]``.

    Args:
        returned: from `return_others`.
        own: ``[own rows, hidden]``, this rank's sums for its own tokens.
        plan: from `plan_dispatch`.
        group: the EP ranks.
    """
    if plan.use_ring:
        parts = list(
            returned.view(group.size - 1, max(plan.tokens_per_rank), own.shape[1])[
                :, : plan.num_tokens
            ].unbind(0)
        )
        return add_in_order([*parts[: group.rank], own, *parts[group.rank :]])
    start, _ = _own_segment(plan.send_counts, group.rank)
    return return_all_to_all(torch.cat([returned[:start], own, returned[start:]]), plan.return_rows)


def _own_segment(counts, rank: int) -> tuple[int, int]:
    start = sum(counts[:rank])
    return start, start + counts[rank]


def _zero_at(counts, rank: int) -> list[int]:
    return [0 if r == rank else n for r, n in enumerate(counts)]


def _without(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return torch.cat([x[:start], x[stop:]])
