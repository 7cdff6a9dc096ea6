"""A model that kills or hangs a process of the zoo is noted as such, and the next ones have their turn."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from dataclasses import replace

import pytest

from tests.zoo.vllm import outcome, ranks, run
from tests.zoo.vllm.recipes import RECIPES

NAMES = ("first", "second", "third")


@pytest.fixture
def recipes():
    some = next(iter(RECIPES.values()))
    return [replace(some, name=name) for name in NAMES]


def _work(left, file, bad, how):
    with file.open("a", buffering=1) as lines:
        for recipe in left:
            if recipe.name == bad:
                if how == "dies":
                    os._exit(11)
                time.sleep(600)
            found = dict.fromkeys(ranks.STRATEGIES, {"status": "placed", "reason": ""})
            alone = {"status": "built", "reason": "", "name": recipe.name}
            lines.write(json.dumps(found | alone) + "\n")


def _go(recipes, directory, bad, how):
    context = multiprocessing.get_context("fork")

    def make(members):
        return lambda left, attempt: [
            context.Process(
                target=_work,
                args=(left, directory / run.FILES[m], bad if m == members[-1] else "", how),
            )
            for m in members
        ]

    crews = [run.Crew(m, recipes, directory, make(m)) for m in ([0], [1, 2])]
    while crews:
        crews = [crew for crew in crews if crew.working()]
        time.sleep(0.01)
    return outcome.read(directory)


@pytest.mark.parametrize("how, reason", [("dies", "exit code 11"), ("hangs", "no answer")])
def test_the_next_model_has_its_turn(how, reason, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 3.0)
    found = _go(recipes, tmp_path, "second", how)
    assert list(found) == list(NAMES)
    assert not found["second"].built and found["second"].reason == reason
    for name in ("first", "third"):
        assert found[name].built and set(found[name].status.values()) == {"placed"}


def _line(status, reason=""):
    return dict.fromkeys(ranks.STRATEGIES, {"status": status, "reason": reason}) | {"name": "m"}


@pytest.mark.parametrize(
    "ranks_saw, expected",
    [
        (("placed", "placed"), "placed"),
        (("placed", "wrong"), "wrong"),
        (("refused", "refused"), "refused"),
        (("refused", "wrong"), "wrong"),
        (("refused", "failed"), "failed"),
        (("crashed", "wrong"), "crashed"),
        (("none", "none"), "none"),
    ],
)
def test_one_ranks_fault_is_the_models(ranks_saw, expected, tmp_path):
    alone = {"name": "m", "status": "built", "reason": ""}
    for file, line in zip(run.FILES.values(), (alone, *map(_line, ranks_saw))):
        (tmp_path / file).write_text(json.dumps(line) + "\n")
    assert set(outcome.read(tmp_path)["m"].status.values()) == {expected}
