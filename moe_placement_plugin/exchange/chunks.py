"""Cut an exchange into chunks: runs of layers that fit the staging memory together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .transfer_table import CopyTable, ReadTable, TransferTable

if TYPE_CHECKING:
    from .plan import ExchangePlan


@dataclass(frozen=True, eq=False)
class Chunk:
    """Hold layers that are staged, agreed on and committed together.

    Attributes:
        rows: rows of the layers.
        transfers: as `ExchangePlan.transfers`, in the order of their rounds.
        round_of: int32 ``[transfers]``, ascending: in a round every rank sends to at most one rank
            and receives from at most one.
        reads, copies: as `ExchangePlan.reads` and `.copies`.
        staging_bytes: int64 ``[ranks]``, staging memory that the chunk needs on each rank.
    """

    rows: tuple[int, ...]
    transfers: TransferTable
    round_of: np.ndarray
    reads: ReadTable
    copies: CopyTable
    staging_bytes: np.ndarray

    @property
    def num_rounds(self) -> int:
        """Return the number of rounds over all ranks."""
        return int(self.round_of[-1]) + 1 if self.round_of.size else 0


def cut(
    plan: ExchangePlan,
    expert_bytes: np.ndarray,
    staging_bytes: int | None,
    max_layers: int | None,
) -> Iterator[Chunk]:
    """Cut a plan into chunks, each of as many layers as the limits allow.

    Args:
        plan: whose layers each fit by themselves.
        expert_bytes: int64 ``[layers]``, of one expert of each layer as it is staged.
        staging_bytes: bound on each rank's staging memory; None for one chunk.
        max_layers: most layers of a chunk; None for no limit.
    """
    rows: list[int] = []
    incoming = np.zeros(plan.new.num_ranks, dtype=np.int64)
    scratch = np.zeros_like(incoming)
    for row in plan.changed_rows.tolist():
        size = expert_bytes[row]
        more = incoming + plan.incoming[row] * size
        opened = np.maximum(scratch, plan.needs_scratch[row] * size)
        if rows and (
            (max_layers is not None and len(rows) == max_layers)
            or (staging_bytes is not None and (more + opened).max() > staging_bytes)
        ):
            yield _chunk_of(plan, rows, incoming + scratch)
            rows = []
            more, opened = plan.incoming[row] * size, plan.needs_scratch[row] * size
        rows.append(row)
        incoming, scratch = more, opened
    if rows:
        yield _chunk_of(plan, rows, incoming + scratch)


def _chunk_of(plan: ExchangePlan, rows: list[int], staging: np.ndarray) -> Chunk:
    from .round_kernel import color  # lazy: numba

    first, last = rows[0], rows[-1]
    transfers = plan.transfers.within(first, last)
    rounds = color(
        transfers.from_rank.astype(np.int64),
        transfers.to_rank.astype(np.int64),
        plan.new.num_ranks,
    )
    order = np.argsort(rounds, kind="stable")
    return Chunk(
        tuple(rows),
        transfers.where(order),
        rounds[order],
        plan.reads.within(first, last),
        plan.copies.within(first, last),
        staging,
    )
