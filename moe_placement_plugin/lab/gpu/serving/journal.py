"""Keep what a run has found, on the console and in its file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console


class Journal:
    """Hold a run's result, which is saved after each step.

    So a time limit loses no more than the last.

    Args:
        file: where it is written, None for nowhere.

    Attributes:
        result: plain data.
        failed: what went wrong, a line for each.
        console: where tables are printed.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.result: dict = {}
        self.failed: list[str] = []
        self.console = Console(width=200, highlight=False)

    def note(self, key: str, value: object) -> None:
        """Keep a part of the result."""
        self.result[key] = value
        self.save()

    def save(self) -> None:
        """Write what there is so far."""
        if self.file:
            self.file.write_text(json.dumps(self.result, indent=1))

    def say(self, text: str) -> None:
        """Print a line as it is: a log's "[/..." is no markup."""
        self.console.print(text, markup=False)

    def fail(self, text: str) -> None:
        """Keep and print what went wrong with one server; the others are measured."""
        self.failed.append(text)
        self.note("failed", self.failed)
        self.say(text)
