"""Recording in a real vLLM, against the routing that Hugging Face's implementation of the model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_placement_plugin import ExpertLoad
from moe_placement_plugin.demo.tiny_models import write_qwen3_moe

from ..support.children import engine_lock, python, run_child
from ..support.vllm_runner import PROMPTS
from .routing_reference import Reference, check

pytest.importorskip("vllm", reason="vLLM is not installed here")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model") / "qwen")


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Case -> (answers, recording), all from one child process."""
    folder = tmp_path_factory.mktemp("recordings")
    both = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    engines = {
        # Compiled, expert parallelism off: an operator records before deciding.
        "alone": {"enforce_eager": False},
        # Every rank sees every token.
        "two-ranks": both | {"expert_placement_strategy": "zigzag"},
    }
    cases = [
        {
            "name": name,
            "engine": {
                "model": str(model),
                **engine,
                "additional_config": {
                    "expert_load_record": str(folder / name), "expert_load_interval": 0.5, "expert_load_coactivation": name == "two-ranks",
                },
            },
            "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1" if name == "two-ranks" else "0"},
        }
        for name, engine in engines.items()
    ]  # fmt: skip
    wanted, got = folder / "cases.json", folder / "results.json"
    wanted.write_text(json.dumps(cases))
    with engine_lock():
        done = run_child(python("-m", "tests.support.vllm_runner", str(wanted), str(got)), 400, cwd=ROOT)
    assert done.code == 0, done.output[-4000:]
    results = json.loads(got.read_text())
    for name, result in results.items():
        assert "error" not in result, (name, result, done.output[-3000:])
    return {name: (result["answers"], ExpertLoad.read(folder / name)) for name, result in results.items()}


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    return Reference(model)


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["alone", "two-ranks"])
def test_counts_are_the_models_own_routing(runs, reference, name):
    answers, load = runs[name]
    prompts = [reference.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    counts, pairs = reference.expected(prompts, [answer["ids"] for answer in answers])
    check(load, counts, pairs if name == "two-ranks" else None)
    assert load.layer_ids == (0, 1, 2, 3)
    assert load.metadata["engine"].startswith("vllm ") and load.metadata["top_k"] == 4
