"""Keep what an exchange does in tables with named columns: transfers, reads, copies.

Each table is one int32 array, which the compiled kernels fill, in ascending order of its layers'
rows unless said otherwise. Slots are local to their rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

SCRATCH = -1
"""Number, in a copy, of the scratch row, which holds one expert that no slot holds meanwhile."""


class Transfer(NamedTuple):
    """Bring one expert of a layer from one rank to another."""

    row: int
    expert: int
    from_rank: int
    from_slot: int
    to_rank: int
    to_slot: int


class Read(NamedTuple):
    """Read one expert of a layer from the checkpoint into a slot of a rank."""

    row: int
    expert: int
    rank: int
    slot: int


class Copy(NamedTuple):
    """Copy one expert of a layer within a rank, from slot to slot or scratch row."""

    row: int
    rank: int
    from_slot: int
    to_slot: int


Entry = TypeVar("Entry", Transfer, Read, Copy)
Table = TypeVar("Table", bound="_Table[Any]")


class _Column:
    """Gives one column of a table, int32 ``[n]``."""

    def __init__(self, number: int):
        self._index = (slice(None), number)

    def __get__(self, table: _Table[Any], owner: type) -> np.ndarray:
        return table.array[self._index]


@dataclass(eq=False)
class _Table(Generic[Entry]):
    """Hold rows of one kind.

    Attributes:
        array: int32 ``[n, columns]``.
        entry: what iteration makes of a row.
    """

    array: np.ndarray
    entry: ClassVar[Any]
    row = _Column(0)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Entry]:
        return map(self.entry._make, self.array.tolist())

    def where(self: Table, chosen: np.ndarray) -> Table:
        """Return the entries that a bool ``[n]`` is true of, or in the order of an int ``[m]``."""
        return type(self)(self.array[chosen])

    def within(self: Table, first: int, last: int) -> Table:
        """Return the entries of the rows from ``first`` to ``last``."""
        rows = self.row
        begin, end = np.searchsorted(rows, first), np.searchsorted(rows, last, side="right")
        return type(self)(self.array[begin:end])

    def among(self: Table, rows: np.ndarray) -> Table:
        """Return the entries of some rows, numbered by the rows' place among these.

        Args:
            rows: int ``[m]``, ascending.
        """
        place = np.minimum(np.searchsorted(rows, self.row), len(rows) - 1)
        there = rows[place] == self.row
        array = self.array[there]
        array[:, 0] = place[there]
        return type(self)(array)


class TransferTable(_Table[Transfer]):
    """Hold the experts that cross between ranks."""

    entry = Transfer
    expert = _Column(1)
    from_rank = _Column(2)
    from_slot = _Column(3)
    to_rank = _Column(4)
    to_slot = _Column(5)


class ReadTable(_Table[Read]):
    """Hold the experts that come from the checkpoint."""

    entry = Read
    expert = _Column(1)
    rank = _Column(2)
    slot = _Column(3)


class CopyTable(_Table[Copy]):
    """Hold copies within ranks, each rank's in the order in which they have to be done."""

    entry = Copy
    rank = _Column(1)
    from_slot = _Column(2)
    to_slot = _Column(3)
