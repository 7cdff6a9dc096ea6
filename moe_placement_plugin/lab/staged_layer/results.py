"""Hold what the stages of a MoE layer hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Selection:
    """Hold where the router sends this rank's tokens, before anything is exchanged.

    Attributes:
        experts: int64 ``[tokens, top_k]``, logical experts, distinct within a token.
        slots: int64 ``[tokens, top_k]``, the physical expert that serves each of them.
        weights: float32 ``[tokens, top_k]``, what each expert's output is multiplied by
            (renormalised and scaled).
    """

    experts: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor

    def rows(self, start: int, stop: int) -> Selection:
        """Return the selection of the tokens ``start:stop``."""
        return Selection(self.experts[start:stop], self.slots[start:stop], self.weights[start:stop])


@dataclass(frozen=True, eq=False)
class RouteOutput:
    """Hold what the matmuls of one rank need, the same for both exchanges.

    The rows are the tokens that lie on this rank after the exchange. All fields are filtered to
    this rank's slots together: an entry of ``local_slots`` that is -1 is in no group and has weight
    0.

    Attributes:
        group_sizes: int64 ``[local slots]``, assignments (row, choice) of each local slot; sums to
            the number of entries of ``local_slots`` that are not -1.
        local_slots: int32 ``[rows, top_k]``, contiguous (the engines' kernels read it by address),
            local slot of each choice, -1 where the choice lies on another rank or the row is
            padding.
        buckets: int32 ``[rows, top_k]``, the same with ``num_slots`` in place of -1: the group that
            a choice is counted in.
        weights: float32 ``[rows, top_k]``, router weight of each choice, 0 where ``local_slots`` is
            -1.
        complete: whether it is known on the host that no entry of ``local_slots`` is -1 (one rank,
            no padding).
    """

    group_sizes: torch.Tensor
    local_slots: torch.Tensor
    buckets: torch.Tensor
    weights: torch.Tensor
    complete: bool

    @property
    def num_rows(self) -> int:
        """Return the number of tokens on this rank after the exchange."""
        return self.local_slots.shape[0]

    @property
    def num_slots(self) -> int:
        """Return the number of physical experts of this rank."""
        return self.group_sizes.shape[0]


@dataclass(frozen=True, eq=False)
class RouteMetadata:
    """Hold what undoes the exchange. Fields of the other exchange are empty.

    Attributes:
        use_ring: all-gather + reduce-scatter (True) or all-to-all (False).
        num_tokens: tokens of this rank before the exchange.
        tokens_per_rank: ring: tokens of each rank before the exchange, ``[ranks]``. Each rank's
            rows are padded to the greatest of them, so that row ``r * max + t`` is token t of rank
            r.
        send_counts: all-to-all: rows sent to each rank, ``[ranks]``. A token is sent once to every
            rank that holds at least one of its choices.
        receive_counts: all-to-all: rows received from each rank, ``[ranks]``, in this order.
        sent_tokens: all-to-all: int64 ``[rows sent]``, the token that each sent row is a copy of.
        sent_slots: all-to-all: int32 ``[rows sent, top_k]``, local slot on the rank that the row is
            sent to, -1 elsewhere.
        return_rows: all-to-all: int64 ``[tokens, min(top_k, ranks)]``, the sent rows of each token
            in ascending order of rank, -1 as padding.
    """

    use_ring: bool
    num_tokens: int
    tokens_per_rank: tuple[int, ...] = ()
    send_counts: tuple[int, ...] = ()
    receive_counts: tuple[int, ...] = ()
    sent_tokens: torch.Tensor | None = None
    sent_slots: torch.Tensor | None = None
    return_rows: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class ExpertHidden:
    """Hold the result of `gmm_up`.

    Attributes:
        values: what the matmuls of ``gmm_down`` read, in their own order of rows: the engines'
            kernels ``[rows * top_k, intermediate]``, torch ``[assignments sorted by slot,
            intermediate]``, dense ``[local slots, rows, intermediate]``. While only some columns of
            the embedding have been multiplied: the sums so far, in float32, with twice the
            intermediate size (gate, then up).
        plan: the order of rows, made once and used by both matmuls.
        columns: embedding columns multiplied so far; the hidden size when ``values`` are activated.
    """

    values: torch.Tensor
    plan: Any
    columns: int
