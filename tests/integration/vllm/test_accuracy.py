"""Test the trained tiny MoE under vLLM's CPU build.

Redundant experts are under its EPLB, which does not move them here.
"""

from __future__ import annotations

import pytest

from ...unit.lab.accuracy.accuracy import check_every_strategy

pytest.importorskip("vllm", reason="vLLM is not installed here")
pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_every_strategy_answers_as_stock(tmp_path):
    check_every_strategy(tmp_path, "vllm", "zigzag", "balanced", "eplb+4")
