"""Run the Python blocks of the pages, and check that they do what the pages say."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import DOCS


def run_blocks(page: str, together: bool) -> list[dict]:
    """Execute a page's Python blocks: in one scope, or each in its own."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    assert blocks, f"{page} has no Python block"
    scopes = [{}] if together else [{} for _ in blocks]
    for number, block in enumerate(blocks):
        exec(block, scopes[0 if together else number])
    return scopes


def test_the_planners_page():
    for scope in run_blocks("planner.md", together=False):
        assert scope["found"].overall > 0.99
        assert 0 < scope["later"].moved_slots <= 500 and scope["later"].gain > 0


def test_the_exchanges_page():
    (scope,) = run_blocks("exchange.md", together=True)
    said = re.search(r"print\(moves\)  # (.*), \.\.\.", (DOCS / "exchange.md").read_text()).group(1)
    assert str(scope["moves"]).startswith(said)
    assert len(scope["chunks"]) == 1 and callable(scope["rebalance"])


def test_the_staged_layers_page():
    torch = pytest.importorskip("torch", reason="the staged layer needs torch")
    torch.manual_seed(0)
    (scope,) = run_blocks("moe.md", together=True)
    assert scope["output"].shape == (10, 128) and scope["output"].isfinite().all()
