"""Show what a verb that starts servers is doing, while it is doing it."""

from __future__ import annotations

import time

from rich.console import Console


class Progress:
    """Rewrite one line on a terminal; print one every ten seconds elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self.status = console.status("") if console.is_terminal else None
        self.what, self.shown = "", 0.0

    def __enter__(self) -> Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def __call__(self, what: str, seconds: float, line: str) -> None:
        if self.status:
            self.status.update(f"{what} ({seconds:.0f} s) [dim]{_last_words(line)}[/dim]")
        elif what != self.what or time.monotonic() - self.shown > 10:
            self.console.print(f"  {what} ({seconds:.0f} s)", markup=False, highlight=False)
            self.shown = time.monotonic()
        self.what = what


def _last_words(line: str) -> str:
    return line[-60:].replace("[", "(").replace("]", ")")
