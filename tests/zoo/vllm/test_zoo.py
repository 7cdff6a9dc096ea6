"""Test that every MoE architecture of the installed vLLM is placed, or refused by name.

See docs/zoo.md.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.paths import DOCS, ROOT
from tests.zoo import table
from tests.zoo.vllm import outcome
from tests.zoo.vllm.document import render
from tests.zoo.vllm.listed import FAULTS, NOT_IN_THE_ZOO
from tests.zoo.vllm.ranks import STRATEGIES
from tests.zoo.vllm.recipes import PLANTED, RECIPES

pytest.importorskip("vllm", reason="the zoo of vLLM needs vLLM")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, outcome.Outcome]:
    directory = tmp_path_factory.mktemp("zoo")
    log = directory / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "tests.zoo.vllm.run", str(directory)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output,
            stderr=subprocess.STDOUT, timeout=1500,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()[-3000:]
    return outcome.read(directory)


def test_every_registered_moe_class_is_in_the_zoo_or_listed_with_a_reason():
    from tests.zoo.vllm.registered import moe_architectures

    registered = set(moe_architectures())
    in_zoo = {recipe.draft or recipe.architecture for recipe in RECIPES.values()}
    assert not registered - in_zoo - set(NOT_IN_THE_ZOO), "registered, but unknown to the zoo"
    assert not set(NOT_IN_THE_ZOO) - registered, "listed, but not registered any more"
    assert not in_zoo & set(NOT_IN_THE_ZOO), "in the zoo, and listed as not in it"


def test_the_plugin_knows_the_models_whose_experts_are_no_routed_experts():
    from moe_placement_plugin.engines.vllm.support import EXPERTS_OF_THEIR_OWN

    own_kind = {recipe.architecture for recipe in RECIPES.values() if recipe.own_kind}
    assert own_kind == set(EXPERTS_OF_THEIR_OWN)


@pytest.mark.engine
@pytest.mark.parametrize("name", RECIPES)
def test_vllm_alone_builds_it_or_says_why_not(name, outcomes):
    recipe, found = RECIPES[name], outcomes[name]
    if recipe.unbuildable:
        assert not found.built, f"{name} can be built by now: take its `unbuildable` away"
        assert recipe.unbuildable in found.reason
    else:
        assert found.built, found.reason


@pytest.mark.engine
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if not r.unbuildable])
def test_experts_are_placed_or_refused(name, strategy, outcomes, request):
    if (name, strategy) in FAULTS:
        request.applymarker(pytest.mark.xfail(reason=FAULTS[name, strategy], strict=True))
    status, reason = outcomes[name].status[strategy], outcomes[name].reasons[strategy]
    assert status in ("placed", "refused", "none"), reason


@pytest.mark.engine
def test_a_loader_that_exchanges_two_experts_is_seen(outcomes):
    found = outcomes[PLANTED.name]
    assert found.status["zigzag"] == "wrong"
    assert "w13_weight[0] holds expert 2, not expert 0" in found.reasons["zigzag"]
    assert found.status["shuffled"] == "wrong"


@pytest.mark.engine
def test_table_in_the_documentation_is_what_was_seen(outcomes):
    document = DOCS / "zoo.md"
    stale = {
        name: made
        for name, made in render(outcomes).items()
        if table.current(document, name) != made
    }
    assert not stale, "docs/zoo.md is stale: run `python -m tests.zoo.vllm.document`"
