"""Test recording in a real SGLang against the routing that Hugging Face's model computes."""

from __future__ import annotations

import json

import pytest

from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.lab.demo.tiny_models import write_qwen3_moe
from tests.support.paths import ROOT

from ...support.children import engine_lock, python, run_child
from ..routing_reference import Reference, check

pytest.importorskip("sglang", reason="SGLang is not installed here")


@pytest.mark.engine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_counts_are_the_models_own_routing(tmp_path, ranks):
    from .engines import ENGINE, ENV, PROMPTS, threads

    model = write_qwen3_moe(tmp_path / "qwen", num_experts=32)
    path, result = tmp_path / "load", tmp_path / "ids.json"
    arguments = ENGINE | {
        "model_path": str(model), "skip_tokenizer_init": True, "tp_size": ranks, "ep_size": ranks,
        "expert_load_record": str(path), "expert_load_interval": 60,
    }  # fmt: skip
    if ranks == 2:  # logical ids, whatever the placement; alone, recording must not need one
        arguments |= {"expert_placement_strategy": "zigzag", "expert_load_coactivation": True}
    workers = ["forked"] if ranks == 2 else []
    command = python(
        "-m",
        "tests.integration.sglang.recording_child",
        json.dumps(arguments),
        json.dumps(PROMPTS),
        str(result),
        *workers,
    )
    with engine_lock():
        done = run_child(
            command, 240, env=ENV | {"SGLANG_CPU_OMP_THREADS_BIND": threads(ranks)}, cwd=ROOT
        )
    assert result.exists(), done.output[-4000:]
    counts, pairs = Reference(model).expected(PROMPTS, json.loads(result.read_text()))
    load = read_load(path)
    check(load, counts, pairs if ranks == 2 else None)
    assert load.metadata["engine"].startswith("sglang ") and load.metadata["expert_parallel"] == (
        ranks == 2
    )
