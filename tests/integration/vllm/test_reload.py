"""Test new weights for a real vLLM that serves.

What lies in every slot afterwards is what the engine's own placement would have there.

The CPU build's own ``reload_weights`` changes what it answers, so that a server with vLLM's linear
placement and the same reloads is compared with, not one that was never told to reload.
"""

from __future__ import annotations

import pytest

from moe_placement_plugin import Placement
from moe_placement_plugin.formats.plan_or_load import write as write_file
from moe_placement_plugin.lab.demo.tiny_models import Size, write_qwen3_moe
from tests.integration.vllm.conftest import ONE_EACH, TWO_RANKS, run_cases
from tests.support.children import python_path
from tests.support.paths import FAULTS_SITE
from tests.support.rebalance_rules import ANY_GAIN_AND_PHASE
from tests.support.stacked_models import write_gpt_oss

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

EPLB = {
    "enable_eplb": True,
    "eplb_config": {"window_size": 2, "step_interval": 2, "num_redundant_experts": 2},
    "expert_placement_strategy": "eplb",
    "additional_config": {"expert_rebalance": ANY_GAIN_AND_PHASE},
}

KERNEL_FORMAT = {"weights_iterator": [], "is_checkpoint_format": False}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Return the result of each case.

    The same checkpoint again, then another one, then the first through a trainer's engine; the last
    case has vLLM's own loading under EPLB.
    """
    folder = tmp_path_factory.mktemp("reloaded")
    writers = {"qwen": write_qwen3_moe, "oss": write_gpt_oss}
    sizes = {"qwen": {"num_experts": 8, "size": Size(layers=2)}, "oss": {}}
    paths = {
        f"{name}{seed}": str(write(folder / f"{name}{seed}", seed=seed, **sizes[name]))
        for name, write in writers.items()
        for seed in (0, 7)
    }

    again = {"weights_path": paths["qwen7"]}

    def case(name, more, *reloads, **env):
        model = name.split()[0]
        engine = {"model": paths[f"{model}0"], "enable_prefix_caching": False, **TWO_RANKS, **more}
        other = {"weights_path": paths[f"{model}7"]}
        calls = [{}, other, {"transfer": paths[f"{model}0"]}, *reloads]
        return {"name": name, "engine": engine, "env": {**ONE_EACH, **env}, "reload": calls}

    plan = folder / "plan.json"
    write_file(Placement([[5, 0, 3, 6, 1, 2, 7, 4]] * 2, 8, (4, 4)), plan)
    zigzag = {"expert_placement_strategy": "zigzag"}
    cases = [
        case("qwen linear", {}),
        case("qwen zigzag", zigzag, KERNEL_FORMAT, again),
        case("qwen eplb", EPLB),
        case("oss plan", {"expert_placement_file": plan}),
        case("oss zigzag", zigzag, {"transfer": paths["oss7"], "in_place": True}, {}),
        case(
            "qwen first table",
            EPLB,
            TEST_LOAD_FAULT="new weights by the first table",
            PYTHONPATH=python_path(FAULTS_SITE),
        ),
    ]
    return run_cases(folder, cases, {}, 1200)


def by_expert(ranks):
    """Return the digests by (layer, expert), and the experts whose replicas differ."""
    found, differ = {}, set()
    for rank in ranks:
        for layer, slots in rank["layers"].items():
            for expert, digests in slots:
                if found.setdefault((layer, expert), digests) != digests:
                    differ.add((layer, expert))
    return found, differ


def results(reloaded, name):
    assert "error" not in reloaded[name], reloaded[name].get("traceback")
    return reloaded[name]


@pytest.mark.parametrize("name", ["qwen zigzag", "qwen eplb"])
def test_every_slot_holds_its_expert_of_the_new_checkpoint(reloaded, name):
    reference, ours = results(reloaded, "qwen linear"), results(reloaded, name)
    assert by_expert(ours["before"]) == by_expert(reference["before"])
    for theirs, mine in zip(reference["reloaded"], ours["reloaded"][:3], strict=True):
        assert mine["error"] is None
        assert by_expert(mine["digests"]) == (by_expert(theirs["digests"])[0], set())
        assert [a["ids"] for a in mine["answers"]] == [a["ids"] for a in theirs["answers"]]
        assert all(rank["verified"] for rank in mine["digests"]), "digests were not taken anew"
    first, second, third = (by_expert(r["digests"])[0] for r in ours["reloaded"][:3])
    assert all(first[key] != second[key] for key in first) and third == first


def test_eplb_had_moved_experts_before_each_reload(reloaded):
    tables = [
        [[expert for expert, _ in rank["layers"]["0"]] for rank in digests]
        for digests in (r["digests"] for r in results(reloaded, "qwen eplb")["reloaded"])
    ]
    first = [[0, 1, 2, 3, 4], [5, 6, 7, 0, 1]]
    assert first not in tables


def test_gpt_oss_gets_new_experts_which_vllm_alone_loses(reloaded):
    """Two placements agree about every expert; vLLM's own has no reload to compare with."""
    ours, other = results(reloaded, "oss zigzag"), results(reloaded, "oss plan")
    for mine, theirs in zip(ours["reloaded"][:3], other["reloaded"], strict=True):
        assert by_expert(mine["digests"]) == by_expert(theirs["digests"])
        assert [a["ids"] for a in mine["answers"]] == [a["ids"] for a in theirs["answers"]]
    before = by_expert(ours["before"])[0]
    first, second, third = (by_expert(r["digests"])[0] for r in ours["reloaded"][:3])
    assert all(r["error"] is None for r in ours["reloaded"][:3])
    assert first.keys() == before.keys() and third == first
    assert all(first[key] != second[key] for key in first)
    assert all(rank["verified"] for r in ours["reloaded"][:3] for rank in r["digests"])


@pytest.mark.parametrize(
    ("name", "said"),
    [("qwen zigzag", "is_checkpoint_format=False"), ("oss zigzag", "through InPlace, which is")],
)
def test_weights_that_go_past_the_placement_are_refused_and_nothing_changes(reloaded, name, said):
    *_, before, refused, after = results(reloaded, name)["reloaded"]
    assert said in refused["error"]
    assert refused["answers"] == before["answers"]
    assert by_expert(refused["digests"]) == by_expert(before["digests"])
    assert after["error"] is None, "the refusal left something behind"


def test_weights_by_the_first_table_would_be_seen(reloaded):
    """The negative control: the same server without the table in force."""
    result = results(reloaded, "qwen first table")
    faulty = result["reloaded"][0]
    assert "replicas of an expert differ" in (faulty["error"] or ""), faulty["error"]
    assert faulty["answers"] is None and result["ended"], "it served what it had found to be wrong"
