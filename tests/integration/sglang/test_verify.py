"""Test fingerprints in real SGLang engines: spoiled weights and maps are noticed.

They are named. Three engines serve, and five must not.

Three engines serve, and five must not.
"""

from __future__ import annotations

import re

import pytest

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.engines.sglang import verification
from moe_placement_plugin.formats.plan_json import read_plan
from tests.integration.sglang import faults
from tests.integration.sglang.engines import Outcome, case, run_cases
from tests.support.children import engine_lock

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3000)]

CHECK = verification.ACTION
SPOILED = [*faults.FAULTS, *faults.EVERYWHERE]

RUN = {
    "one bit of w13 flipped": "w13_weight",
    "one bit of w2 flipped": "w2_weight",
    "sign of a zero": "w13_weight",
    "another NaN": "w13_weight",
    "gate and up halves exchanged": "w13_weight",
    "two rows exchanged": "w2_weight",
    "w2 transposed": "w2_weight",
    "w13 moved without w2": "w13_weight",
    "scale of another slot": "w13_scale",
    "zero point of another slot": "w2_zero_point",
    "bias (a plain attribute) of another slot": "w2_bias",
    "what the kernel keeps beside the layer": "quant_method.alphas",
}
"""Fault -> the tensor that the message must name; the others change both weights."""

STARTS = {
    "replica-left-out": "replicas",
    "replica-of-another": "replicas",
    "wrong-everywhere": "checkpoint",
    "hook-lost": "replicas",
    "past-the-loader": "off",
}
"""Fault of the start-up -> the level that must notice it."""


@pytest.fixture(scope="module")
def plan(files) -> Placement:
    """Read the plan that every engine here is served with.

    It has 32 experts in 36 slots on two ranks.
    """
    return read_plan(files["redundant"])


@pytest.fixture(scope="module")
def outcomes(models, files, tmp_path_factory) -> dict[str, Outcome]:
    """Run every engine, one after another.

    Those that die take their caller along, so each is the last of its own.
    """
    env = {"PYTHONPATH": faults.install(tmp_path_factory.mktemp("plugin"))}
    placed = {"expert_placement_file": str(files["redundant"]), "ep_num_redundant_experts": 4}
    spoiled = [
        action for fault in SPOILED for action in (f"fault:{fault}", CHECK, "restore", CHECK)
    ]
    cut = ("fault:one bit of w2 flipped", CHECK, "restore", CHECK)
    cases = [
        case("spoiled", models["qwen32"], 2, 2, actions=(CHECK, *spoiled), **placed),
        case(
            "cut",
            models["glm"],
            4,
            2,
            actions=(CHECK, *cut),
            expert_placement_strategy="zigzag",
            ep_num_redundant_experts=4,
            expert_placement_verify="checkpoint",
        ),
        case(
            "alone",
            models["qwen32"],
            2,
            2,
            actions=(CHECK,),
            ep_num_redundant_experts=4,
            expert_placement_verify="replicas",
        ),
    ]
    faulty = [
        case(
            fault,
            models["qwen32"],
            2,
            2,
            {faults.VARIABLE: fault},
            actions=(CHECK,),
            expert_placement_verify=level_asked,
            **placed,
        )
        for fault, level_asked in STARTS.items()
    ]
    with engine_lock():
        found = run_cases([*cases, faulty[0]], tmp_path_factory.mktemp("serving"), env=env)
        for start in faulty[1:]:
            found |= run_cases([start], tmp_path_factory.mktemp(start["name"]), env=env)
    return found


def test_spoiled_weights_are_named_and_restored_ones_pass(outcomes, plan):
    checks = outcomes["spoiled"].result["checks"]
    assert checks[0] == [True, "Success."]
    row = plan.physical_to_logical[plan.layer_ids.index(faults.LAYER)].tolist()
    wrong, other = row[18 + faults.SLOT], row[18 + faults.OTHER]
    print("\n| fault | what the check says |\n|---|---|")
    for number, fault in enumerate(SPOILED):
        injected, (succeeded, message), restored, again = checks[1 + 4 * number : 5 + 4 * number]
        print(f"| {fault} | {message.partition('. ')[0]} |")
        assert injected[0] and restored[0] and not succeeded, fault
        assert again == [True, "Success."], fault
        found = re.search(expected(fault, wrong, other), message)
        assert found, f"{fault}: {message}"


def expected(fault: str, wrong: int, other: int) -> str:
    """Return what the message must say, a pattern."""
    slot = f"layer {faults.LAYER}, slot {faults.SLOT} of rank 1 should hold expert"
    names = RUN.get(fault, "w13_weight, w2_weight")
    known = {
        "two slots exchanged": rf"{slot} {wrong}: it differs in {names}, .*slot {faults.OTHER} of "
        rf"rank 1 should hold expert {other}",
        "all slots of the rank moved on by one": r"slot 0 of rank 1 should .*slot 1 of rank 1 "
        rf"should .*and {18 - 4} more",
        "scale lost on one rank": r"layer 2, rank 1: tensors \('quant_method.alphas', "
        r"'w13_weight', .*, expected \(.*'w13_scale'",
        "globally sized tensor indexed locally (PR 8398)": r"EP rank 1: "
        r"model\.layers\.2\..*w2_global_scale "
        r"has 32 rows.* this rank has 18 slots",
        "map changed, weights not moved": rf"{slot} {other}: it differs in .*, which hold expert "
        rf"{wrong}",
        "map leaves an expert out": rf"{slot} {other}: it differs in .*, which hold expert {wrong}",
        "routing table alone changed": rf"layer {faults.LAYER}: tokens of expert 0 go to slot \d+, "
        r"which holds expert 1 by",
        "table of slots alone changed": rf"layer {faults.LAYER}: tokens of expert \d+ go to slot "
        r"\d+, which holds expert \d+ by",
    }
    return known.get(fault, rf"{slot} {wrong}: it differs in {names}, which hold something else")


def test_experts_cut_over_ranks_are_compared_part_by_part(outcomes):
    cut = outcomes["cut"]
    ok, injected, spoiled, restored, again = cut.result["checks"]
    assert ok[0] and injected[0] and restored[0] and again[0] and not spoiled[0]
    assert spoiled[1].startswith(
        "MoE-TP rank 1: expert weights have changed since the model was loaded: layer "
        f"{faults.LAYER}, slot 3 of rank 1"
    )
    assert cut.processes_with("(replicas and checkpoint)") == {
        "TP0 EP0",
        "TP1 EP0",
        "TP2 EP1",
        "TP3 EP1",
    }


def test_without_a_placement_the_engines_own_is_verified(outcomes):
    alone = outcomes["alone"]
    assert alone.result["checks"] == [[True, "Success."]]
    assert alone.processes_with("verified 72 slots in 4 layers of this rank (replicas)") == {
        "TP0 EP0",
        "TP1 EP1",
    }
    assert "expert placement" not in alone.log


@pytest.mark.parametrize("fault", STARTS)
def test_an_engine_that_was_loaded_wrongly_never_serves(outcomes, plan, fault):
    row = plan.physical_to_logical[plan.layer_ids.index(faults.LAYER)].tolist()
    replica, first = (
        f"slot {faults.REPLICA - 18} of rank 1",
        f"slot {row.index(row[faults.REPLICA])} of rank 0",
    )
    differ = (
        f"replicas of an expert differ: layer {faults.LAYER}, expert {row[faults.REPLICA]}: "
        f"{replica} and {first} differ in w13_"
    )
    message = {
        "replica-left-out": f"nothing filled {replica} with w[123] of expert "
        f"{row[faults.REPLICA]}: a loader went round",
        "replica-of-another": differ,
        "wrong-everywhere": r"not those of the checkpoint: layer 2, slot \d+ of rank \d should "
        r"hold expert (6|7): .*, which hold expert (7|6)",
        "past-the-loader": r"nothing was seen to fill w2_weight of the slots of rank \d: a loader "
        r"went round",
        "hook-lost": "SGLang did not apply the hooks (remap|loader) in this process",
    }[fault]
    outcome = outcomes[fault]
    found = re.search(rf"(PlacementError|WeightsMismatch): [^\n]*{message}[^\n]*", outcome.log)
    print(f"\n| {fault} | {found and found[0].partition(': ')[2]} |")
    assert found, outcome.log[-3000:]
    assert "checks" not in outcome.result
