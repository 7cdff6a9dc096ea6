"""The trained tiny MoE under vLLM's CPU build: placed on two ranks it answers as the stock engine does on one.

Redundant experts are not among the cases: vLLM has them only with its EPLB, which its CPU build lacks.
"""

from __future__ import annotations

import pytest

from .accuracy import TINY, check_equal, verify_accuracy

pytest.importorskip("vllm", reason="vLLM is not installed here")
pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_every_strategy_answers_as_stock(tmp_path):
    model, strategies = TINY / "qwen3-moe", ("zigzag", "balanced", "eplb")
    found = verify_accuracy(
        tmp_path, "--engine", "vllm", "--model", model, "--tasks", "tiny_moe", "--limit", 8, "--max-model-len", 64,
        "--strategies", ",".join(strategies), "--expert-placement-file", TINY / "loads" / "qwen3-moe.safetensors", timeout=1400,
    )  # fmt: skip
    check_equal(found, strategies)
