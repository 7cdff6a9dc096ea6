"""Test recording in a real vLLM against the routing that Hugging Face's model computes."""

from __future__ import annotations

import pytest

from tests.integration.routing_reference import Reference, check
from tests.support.vllm_runner import PROMPTS


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_counts_are_the_models_own_routing(checkpoints, recordings, name):
    """Two ranks both see every token, placed otherwise than the logical ids that are recorded."""
    answers, load = recordings[name]
    reference = Reference(checkpoints["qwen"])
    prompts = [reference.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    counts, pairs = reference.expected(prompts, [answer["ids"] for answer in answers])
    check(load, counts, pairs if name == "eager" else None)
    assert load.layer_ids == (0, 1, 2, 3)
    assert load.metadata["engine"].startswith("vllm ") and load.metadata["top_k"] == 4
