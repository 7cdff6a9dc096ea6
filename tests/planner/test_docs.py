"""The examples of docs/planner.md run."""

import re
from pathlib import Path


def test_examples_of_the_planner_page():
    text = (Path(__file__).resolve().parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        scope: dict = {}
        exec(block, scope)
        assert scope["found"].overall > 0.99
        assert 0 < scope["later"].moved_slots <= 500 and scope["later"].gain > 0
