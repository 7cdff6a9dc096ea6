"""The example of docs/moe.md runs."""

import re
from pathlib import Path

import torch


def test_example_of_the_moe_page():
    text = (Path(__file__).resolve().parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict = {}
    torch.manual_seed(0)
    exec(block, scope)
    assert scope["output"].shape == (10, 128) and scope["output"].isfinite().all()
