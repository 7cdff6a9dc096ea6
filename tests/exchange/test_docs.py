"""The examples of docs/exchange.md run."""

from __future__ import annotations

import re
from pathlib import Path


def test_examples_of_the_page():
    text = (Path(__file__).resolve().parents[2] / "docs" / "exchange.md").read_text(
        encoding="utf-8"
    )
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    moves = scope["moves"]
    assert str(moves).startswith(re.search(r"print\(moves\)  # (.*), \.\.\.", text).group(1))
    assert len(scope["chunks"]) == 1 and callable(scope["rebalance"])
