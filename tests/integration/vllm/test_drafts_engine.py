"""Test speculative decoding in a real vLLM on two ranks: drafts are placed.

Neither tokens nor what is accepted differ from linear.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_or_load import write
from tests.support.children import engine_lock, run_child
from tests.support.draft_models import write_dense_qwen3, write_glm4_moe_with_mtp
from tests.support.paths import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

RNG = np.random.default_rng(2)
DRAFT = Placement([RNG.permutation(32)], 32, (16, 16), (4,), "draft")
PLAN = Placement(
    [RNG.permutation(32) for _ in range(3)], 32, (16, 16), (1, 2, 3), "eplb", {}, DRAFT
)


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory) -> tuple[dict[str, dict], Path]:
    """Return (case -> what the engine said, folder)."""
    folder = tmp_path_factory.mktemp("drafts")
    glm = str(write_glm4_moe_with_mtp(folder / "glm"))
    dense = str(write_dense_qwen3(folder / "dense"))
    write(PLAN, folder / "plan.json")
    mtp = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    own = {"method": "draft_model", "model": dense, "num_speculative_tokens": 2}
    zigzag = {"expert_placement_strategy": "zigzag"}
    record = {"expert_load_record": str(folder / "load.safetensors"), "expert_load_interval": 0.5}
    engines = {
        "mtp linear": {"model": glm, **mtp},
        "mtp zigzag": {"model": glm, **mtp, **zigzag},
        "mtp plan": {
            "model": glm,
            **mtp,
            "expert_placement_file": str(folder / "plan.json"),
            **record,
        },
        "dense zigzag": {
            "model": str(checkpoints["qwen"]),
            "speculative_config": own,
            **zigzag,
        },
        "itself zigzag": {
            "model": str(checkpoints["qwen"]),
            "speculative_config": own | {"model": str(checkpoints["qwen"])},
            **zigzag,
        },
    }
    cases = [{"name": name, "engine": engine} for name, engine in engines.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.support.vllm_draft_child", str(folder / "cases.json")]
    with engine_lock():
        finished = run_child(command, 900, cwd=ROOT)
    lines = [json.loads(line[5:]) for line in finished.output.splitlines() if line[:5] == "CASE "]
    assert len(lines) == len(cases), finished.output[-4000:]
    return {line["name"]: line for line in lines}, folder


@pytest.mark.parametrize("name", ["mtp zigzag", "mtp plan"])
def test_tokens_and_what_is_accepted_are_those_of_linear(served, name):
    linear, placed = served[0]["mtp linear"], served[0][name]
    assert "error" not in placed and "error" not in linear, (linear, placed)
    assert placed["tokens"] == linear["tokens"]
    assert placed["accepted"] == linear["accepted"] and any(linear["accepted"].values())


def test_a_dense_draft_of_its_own_is_served(served):
    """It was refused: vLLM puts the draft's config where the target's was."""
    result = served[0]["dense zigzag"]
    assert "error" not in result, result
    assert result["maps"] == [{}, {}] and all(result["tokens"])


def test_a_model_that_drafts_for_itself_is_accepted(served):
    """Nearly always: passes of other sizes round otherwise.

    A wrong expert in either would end that.
    """
    result = served[0]["itself zigzag"]
    assert "error" not in result, result
    accepted = result["accepted"]
    drafted = accepted["vllm:spec_decode_num_draft_tokens"]
    assert accepted["vllm:spec_decode_num_accepted_tokens"] > 0.9 * drafted > 0
    assert result["tokens"] == served[0]["dense zigzag"]["tokens"]
    for rank in range(2):
        for found in result["maps"][rank].values():
            assert found == [e // 2 if e % 2 == rank else -1 for e in range(30)]


def test_the_drafts_experts_lie_where_its_rows_or_the_strategy_put_them(served):
    results = served[0]
    for rank in range(2):
        (of_plan,) = results["mtp plan"]["maps"][rank].values()
        assert of_plan == DRAFT.expert_map(0, rank).tolist()
        (of_zigzag,) = results["mtp zigzag"]["maps"][rank].values()
        assert of_zigzag == [e // 2 if e % 2 == rank else -1 for e in range(32)]


def test_a_drafts_load_is_recorded_apart(served):
    results, folder = served
    target = read_load(folder / "load.safetensors")
    draft = read_load(folder / "load.draft.safetensors")
    assert target.layer_ids == (1, 2, 3) and draft.layer_ids == (4,)
    assert len(set(target.total.sum(axis=1).tolist())) == 1  # each layer counts each token once
    assert draft.total.sum() > 0 and draft.total.sum() % 4 == 0  # four experts a token
