"""Note which ranks have said something: a bit for each, in counters of a store they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RANKS_PER_WORD = 60
"""Ranks whose bits share a counter: each adds a power of two of its own, once."""


class Roll:
    """Notes one thing that each of some ranks says once.

    The store is given to each call, since several calls may be one job of a store's thread
    (`hosts.bounded_store`).

    Args:
        name: of the thing, which the names of the counters begin with.
        ranks: all that are to say it.
    """

    def __init__(self, name: str, ranks: Sequence[int]):
        self._name, self._ranks = name, tuple(ranks)

    @property
    def keys(self) -> list[str]:
        """Return the names of all counters."""
        return [self._key(word) for word in self._words()]

    def add(self, store: Any, rank: int) -> bool:
        """Add a rank's bit; True while others are missing: whoever adds the last sees all."""
        word = rank // RANKS_PER_WORD
        bits = store.add(self._key(word), 1 << rank % RANKS_PER_WORD)
        return bits != self._all_bits(word) or self.incomplete(store, word)

    def incomplete(self, store: Any, known: int | None = None) -> bool:
        """Whether bits are missing in any counter but the one that is known to have all."""
        return any(
            store.add(self._key(word), 0) != self._all_bits(word)
            for word in self._words()
            if word != known
        )

    def present(self, store: Any) -> list[int]:
        """Return the ranks whose bit is there."""
        bits = {word: store.add(self._key(word), 0) for word in self._words()}
        return [r for r in self._ranks if bits[r // RANKS_PER_WORD] >> (r % RANKS_PER_WORD) & 1]

    def missing(self, store: Any) -> list[int]:
        """Return the ranks whose bit is not there."""
        present = set(self.present(store))
        return [rank for rank in self._ranks if rank not in present]

    def _key(self, word: int) -> str:
        return f"{self._name}/{word}"

    def _words(self) -> list[int]:
        return sorted({rank // RANKS_PER_WORD for rank in self._ranks})

    def _all_bits(self, word: int) -> int:
        return sum(1 << r % RANKS_PER_WORD for r in self._ranks if r // RANKS_PER_WORD == word)
