"""The trained tiny MoE under vLLM's CPU build.

Redundant experts are not among the cases: vLLM has them only with its EPLB, which its CPU build lacks.
Strategy balanced is examined under SGLang.
"""

from __future__ import annotations

import pytest

from .accuracy import check_every_strategy

pytest.importorskip("vllm", reason="vLLM is not installed here")
pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_strategies_answer_as_stock(tmp_path):
    check_every_strategy(tmp_path, "vllm", "zigzag", "eplb")
