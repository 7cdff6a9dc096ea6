"""Declare what several verbs of ``moe-placement bench`` take, and how they say how far they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

JsonPath = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
"""Where the figures go."""

VllmPython = Annotated[
    str | None,
    typer.Option("--vllm-python", help="Interpreter that has vLLM, if this one has not."),
]
"""What vLLM's own planner runs under."""


def progress_lines() -> tuple[Callable[[str], None], Callable[[str], None]]:
    """Make two functions that print on stderr: a heading, and an indented line below it."""
    from rich.console import Console

    console = Console(stderr=True)

    def head(text: str) -> None:
        console.print(text)

    def line(text: str) -> None:
        console.print(f"  {text}", highlight=False)

    return head, line
