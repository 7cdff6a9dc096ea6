"""The trained tiny MoE under SGLang's CPU engine; strategy zigzag is examined under vLLM."""

from __future__ import annotations

import pytest

from .accuracy import check_every_strategy

pytest.importorskip("sglang", reason="SGLang is not installed here")
pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_strategies_answer_as_stock(tmp_path):
    check_every_strategy(tmp_path, "sglang", "balanced", "eplb+4")
