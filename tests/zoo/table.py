"""Write the documentation's table of what each architecture does under a placement."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = Sequence[str]


def between(name: str) -> tuple[str, str]:
    """Return the lines of a document that enclose a generated table."""
    return f"<!-- zoo:{name} -->", f"<!-- end of zoo:{name} -->"


def markdown(header: Row, rows: Iterable[Row]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: str) -> str:
    return re.sub(r"\s+", " ", value).replace("|", "\\|").strip()


def current(document: Path, name: str) -> str:
    """Return what stands in the document now.

    Raises:
        ValueError: when the document has no such table.
    """
    begin, end = between(name)
    before, found, rest = document.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{document} has no table {name}: add the lines {begin} and {end}")
    return rest.partition(end)[0].strip()


def replace(document: Path, tables: Mapping[str, str]) -> None:
    """Put tables in the place of those that stand in the document."""
    for name, table in tables.items():
        begin, end = between(name)
        current(document, name)
        before, _, rest = document.read_text().partition(begin)
        document.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
