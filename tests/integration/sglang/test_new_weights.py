"""Test gpt-oss, and new weights while serving, on real engines.

Its checkpoint has all experts in one tensor.

gpt-oss's attention is lent to the CPU engine, see `tests.integration.sglang.gpt_oss`; its experts
are the engine's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang.verification import ACTION
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import Size
from tests.integration.sglang.engines import LONG, Outcome, case, run_cases
from tests.integration.sglang.gpt_oss import install
from tests.support.children import engine_lock
from tests.support.rebalance_rules import ANY_GAIN
from tests.support.stacked_models import write_gpt_oss

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200)]

TOLERANCE = 2e-4
OFTEN = {
    "enable_eplb": True,
    "eplb_rebalance_num_iterations": 4,
    "expert_placement_strategy": "eplb",
    "expert_rebalance": ANY_GAIN,
}


def rescaled(source: Path, target: Path) -> Path:
    """Write a copy of a checkpoint whose experts are other ones.

    The first becomes the last, and all are smaller.
    """
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = {
        name: np.ascontiguousarray(tensor[::-1]) * np.float32(0.9)
        if ".experts." in name
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("new")
    gpt = write_gpt_oss(folder / "gpt-oss", size=Size(layers=3), yarn=False)
    gpt_new = rescaled(gpt, folder / "gpt-oss-new")
    qwen_new = rescaled(models["qwen32"], folder / "qwen-new")
    plan, rng = folder / "plan.json", np.random.default_rng(3)
    write(Placement(np.stack([rng.permutation(8) for _ in range(3)]), 8, (4, 4)), plan)
    # All layers see all tokens, which SGLang's memory for sliding windows asserts against.
    triton = {"attention_backend": "triton", "disable_hybrid_swa_memory": True}
    disk = {"how": "disk", "path": str(gpt_new)}

    def long(wanted: dict, **more) -> dict:
        return wanted | {"max_new_tokens": LONG} | more

    of_gpt_oss = [
        long(case("gpt-oss", gpt, **triton), updates=[disk]),
        case("zigzag", gpt, 2, 2, expert_placement_strategy="zigzag", **triton),
        case("shuffled", gpt, 2, 2, expert_placement_file=str(plan), **triton),
        long(
            case("moving", gpt, 2, 2, ep_num_redundant_experts=2, **OFTEN, **triton),
            updates=[disk],
        ),
    ]
    of_qwen = [
        long(case("qwen32", models["qwen32"]), updates=[{"how": "disk", "path": str(qwen_new)}]),
        long(
            case("qwen-moving", models["qwen32"], 2, 2, ep_num_redundant_experts=4, **OFTEN),
            updates=[
                {"how": "tensor", "path": str(qwen_new)},
                {
                    "how": "tensor",
                    "path": str(models["qwen32"]),
                    "only": "experts.0.down_proj",
                    "load_format": "direct",
                    "rename": "model.layers.1.mlp.experts.w2_weight",
                },
            ],
            actions=(ACTION,),
        ),
    ]
    with engine_lock():
        lent = {"PYTHONPATH": install(folder / "plugin")}
        return run_cases(of_gpt_oss, folder / "gpt-oss-engines", env=lent) | run_cases(
            of_qwen, folder / "qwen-engines"
        )


def rows(outcome: Outcome, update: int | None = None) -> Outcome:
    """Return what was answered at first or after an update, as an outcome of its own."""
    assert "rows" in outcome.result, outcome.log[-3000:]
    if update is None:
        return outcome
    return Outcome(
        {**outcome.result, "rows": outcome.result["updates"][update]["rows"]}, outcome.log
    )


def same(found: Outcome, expected: Outcome) -> float:
    tokens = len(found.ids[0])
    expected = expected.first(tokens)
    assert found.ids == expected.ids
    difference = np.abs(np.array(found.values) - np.array(expected.values)).max()
    assert difference < TOLERANCE
    return difference


@pytest.mark.parametrize("name", ["zigzag", "shuffled"])
def test_gpt_oss_answers_as_on_one_rank(outcomes, name):
    print(f"{same(rows(outcomes[name]), rows(outcomes['gpt-oss'])):.1e}")
    assert outcomes[name].processes_with("is in force in 3 layers") == {"TP0 EP0", "TP1 EP1"}
    assert outcomes[name].processes_with("patch fused-loader in use") == {"TP0 EP0", "TP1 EP1"}


def test_gpt_oss_answers_as_on_one_rank_while_experts_move(outcomes):
    same(rows(outcomes["moving"]), rows(outcomes["gpt-oss"]))


@pytest.mark.parametrize(("name", "stock"), [("moving", "gpt-oss"), ("qwen-moving", "qwen32")])
def test_new_weights_go_by_the_map_in_force(outcomes, name, stock):
    """Rebalances come before; weights come from disk and from memory.

    They come with one tensor for all experts from disk, and with a tensor per expert from memory.
    """
    outcome, expected = outcomes[name], outcomes[stock]
    rows(expected), rows(outcome)
    assert outcome.result["updates"][0]["answer"][0], outcome.result["updates"][0]
    found = rows(outcome, 0)
    print(f"{same(found, rows(expected, 0)):.1e}")
    assert found.values != rows(outcome).values, "the update changed nothing"


@pytest.mark.parametrize("name", ["moving", "qwen-moving"])
def test_experts_move_before_and_after_the_update(outcomes, name):
    log = outcomes[name].log
    before, _, after = log.partition("patch new-weights-")
    assert "expert rebalance accepted" in before and "expert rebalance accepted" in after
    assert "damaged by an exchange" not in log


def test_an_update_by_position_is_refused_and_the_server_goes_on(outcomes):
    succeeded, message = outcomes["qwen-moving"].result["updates"][1]["answer"]
    assert not succeeded and "copies experts into slots by position" in message
    assert rows(outcomes["qwen-moving"], 1).ids == rows(outcomes["qwen-moving"], 0).ids


def test_updated_weights_are_verified_again(outcomes):
    (succeeded, message), *_ = outcomes["qwen-moving"].result["checks"]
    assert succeeded, message
