"""Say as data what an engine adapter refuses.

Each refusal is one rule, from which messages and the docs' tables come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...core.errors import PlacementError
from .options import markdown

C = TypeVar("C")
"""What an engine is started with, as far as the rules of its adapter care."""


@dataclass(frozen=True)
class Rule(Generic[C]):
    """Describe a combination that is refused.

    Attributes:
        kind: heading in the table: model, back end, option, or the flag that it goes with.
        what: the combination in words.
        why: the reason.
        mend: what to do instead.
        applies: whether a combination is meant.
        named: the combination in words for a message, with its values; None says ``what``.
    """

    kind: str
    what: str
    why: str
    mend: str
    applies: Callable[[C], bool]
    named: Callable[[C], str] | None = None

    def subject(self, combination: C) -> str:
        """Return what is refused, for a message."""
        return self.what if self.named is None else self.named(combination)


@dataclass(frozen=True)
class Right:
    """Describe a combination that is right, what makes it so, and how that is known."""

    what: str
    how: str
    known: str


def has(option: str) -> Callable[[Any], bool]:
    """Return a rule's condition: an option of a combination's ``options`` is switched on."""
    return lambda combination: option in combination.options


def together_with(option: str) -> Callable[[Any], str]:
    """Return a rule's words for a message that names an option."""
    return lambda combination: f" together with {option}"


def refuse(rules: Iterable[Rule[C]], combination: C, begin: Callable[[Rule[C]], str]) -> None:
    """Refuse a combination by the first rule that means it.

    Args:
        rules: of the adapter.
        combination: what the engine is started with.
        begin: a rule -> beginning of its message, up to the reason.

    Raises:
        PlacementError: naming the combination, the reason and the mend.
    """
    for rule in rules:
        if rule.applies(combination):
            raise PlacementError(f"{begin(rule)}: {rule.why}; {rule.mend}")


def right_table(right: Sequence[Right]) -> str:
    """Return the table of what is right, Markdown."""
    return markdown(("right", "because", "known from"), [(r.what, r.how, r.known) for r in right])


def refused_table(rules: Sequence[Rule]) -> str:
    """Return the table of what is refused, Markdown."""
    rows = [(r.what, r.kind, r.why, r.mend) for r in rules]
    return markdown(("refused", "kind", "because", "instead"), rows)
