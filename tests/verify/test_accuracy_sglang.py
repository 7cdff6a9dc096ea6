"""The trained tiny MoE under SGLang's CPU engine: placed on two ranks it answers as the stock engine does on one."""

from __future__ import annotations

import pytest

from .accuracy import TINY, check_equal, verify_accuracy

pytest.importorskip("sglang", reason="SGLang is not installed here")
pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_every_strategy_answers_as_stock(tmp_path):
    model, strategies = TINY / "qwen3-moe", ("zigzag", "balanced", "eplb+4")
    found = verify_accuracy(
        tmp_path, "--engine", "sglang", "--model", model, "--tasks", "tiny_moe", "--limit", 8, "--max-model-len", 64,
        "--strategies", ",".join(strategies), "--expert-placement-file", TINY / "loads" / "qwen3-moe.safetensors", timeout=1400,
    )  # fmt: skip
    check_equal(found, strategies)
