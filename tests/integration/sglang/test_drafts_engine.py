"""Test speculative decoding on real engines: tokens and acceptance are stock's.

Wherever the draft's experts lie.

What SGLang's CPU engine lacks for it is lent, see `tests.integration.sglang.speculative`; drafts
and their experts are the engine's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_or_load import write
from tests.integration.sglang.engines import MAX_NEW_TOKENS, PROMPTS, Outcome, case, run_cases
from tests.integration.sglang.speculative import ARGUMENTS, install, write_qwen2_moe
from tests.support.children import engine_lock
from tests.support.rebalance_rules import ANY_GAIN

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

TOLERANCE = 2e-4
TOP_K = 2
OFTEN = {
    "enable_eplb": True,
    "eplb_rebalance_num_iterations": 2,
    "expert_placement_strategy": "eplb",
    "expert_rebalance": ANY_GAIN,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("drafts")


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[str, Outcome]:
    """Run engines whose target drafts for itself: all that a right draft drafts is accepted."""
    model = write_qwen2_moe(folder / "qwen2", top_k=TOP_K)
    rng, plan = np.random.default_rng(3), folder / "plan.json"
    rows = np.stack([rng.permutation(8) for _ in range(4)])
    draft = Placement(rows[2:], 8, (5, 3), (0, 1))
    write(Placement(rows[:2], 8, (4, 4), (0, 1), "custom", {}, draft), plan)
    speculation = ARGUMENTS | {
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": str(model),
    }

    def two(name: str, late_env: dict[str, str] | None = None, **more) -> dict:
        return case(name, model, 2, 2, late_env, **speculation, **more)

    cases = [
        case("plain", model),
        case("stock", model, **speculation),
        two("zigzag", expert_placement_strategy="zigzag"),
        two("shuffled", expert_placement_file=str(plan), expert_load_record=str(folder / "load"))
        | {"rest": 3},  # until an idle engine has written its recordings
        two("moving", ep_num_redundant_experts=2, **OFTEN),
        two("lost", {"DRAFT_FAULT": "routing"}, expert_placement_strategy="zigzag"),
    ]
    with engine_lock():
        return run_cases(cases, folder / "engines", env={"PYTHONPATH": install(folder / "plugin")})


def verified(outcome: Outcome) -> list[int]:
    """Return how many times the target verified drafts, for each prompt."""
    assert "rows" in outcome.result, outcome.log[-3000:]
    return [row["verified"] for row in outcome.result["rows"]]


def test_the_lent_parts_speculate_rightly(outcomes):
    """Tokens are those without speculation, and chains of three are accepted."""
    assert outcomes["stock"].ids == outcomes["plain"].ids
    assert max(verified(outcomes["stock"])) <= MAX_NEW_TOKENS // 3


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("zigzag", "zigzag"),
        ("shuffled", "its rows of the plan"),
        ("moving", "SGLang's own order"),
    ],
)
def test_tokens_and_acceptance_are_stocks(outcomes, name, by):
    found, stock = outcomes[name], outcomes["stock"]
    assert verified(found) == verified(stock)
    assert found.ids == stock.ids
    assert np.abs(np.array(found.values) - np.array(stock.values)).max() < TOLERANCE
    if name == "moving":
        assert found.processes_with("expert rebalance accepted"), "nothing moved"
    placed = f"the draft's experts are placed by {by} in 2 layers (0, 1)"
    assert found.processes_with(placed) == {"TP0 EP0", "TP1 EP1"}


def test_a_draft_that_is_not_routed_by_its_rows_shows(outcomes):
    """Weights lie by the draft's rows, tokens go by the target's: that is the fault.

    They stay right, drafts are hardly accepted.
    """
    assert outcomes["lost"].ids == outcomes["stock"].ids
    assert sum(verified(outcomes["lost"])) > 1.5 * sum(verified(outcomes["stock"]))


def test_the_drafts_load_is_recorded_apart(outcomes, folder):
    """A prompt's tokens are counted once, and each chain's steps but the last.

    So are the tokens that were verified.
    """
    chains = sum(verified(outcomes["shuffled"]))
    steps, width = ARGUMENTS["speculative_num_steps"], ARGUMENTS["speculative_num_draft_tokens"]
    load = read_load(folder / "load.draft")
    for phase, tokens in (
        ("prefill", sum(map(len, PROMPTS))),
        ("decode", chains * (steps - 1 + width)),
    ):
        of_phase = np.array([found == phase for found in load.phases])
        assert load.counts[of_phase].sum(axis=(0, 2)).tolist() == [tokens * TOP_K] * 2, phase
    assert load.layer_ids == (0, 1)
    assert read_load(folder / "load").num_layers == 2
