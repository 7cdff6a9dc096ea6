"""Test that a model that kills or hangs a process of the zoo is noted as such.

The next ones have their turn.
"""

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
        for unit in left:
            recipe, strategy = unit if isinstance(unit, tuple) else (unit, None)
            if recipe.name == bad and strategy != "zigzag":
                if how == "dies":
                    os._exit(11)
                time.sleep(600)
            line = {"status": "placed" if strategy else "built", "reason": ""}
            lines.write(json.dumps(line | {"name": recipe.name, "strategy": strategy}) + "\n")
            if how == "again" and strategy == "shuffled":
                os._exit(ranks.AGAIN)


def _go(recipes, directory, bad, how):
    context = multiprocessing.get_context("fork")

    def make(members, bad):
        return lambda left, attempt: [
            context.Process(
                target=_work,
                args=(left, directory / run.FILES[m], bad if m == members[-1] else "", how),
            )
            for m in members
        ]

    units = [(recipe, strategy) for recipe in recipes for strategy in ranks.STRATEGIES]
    crews = [
        run.Crew([0], recipes, directory, make([0], "third")),
        run.Crew([1, 2], units, directory, make([1, 2], bad)),
    ]
    while crews:
        crews = [crew for crew in crews if crew.working()]
        time.sleep(0.01)
    return outcome.read(directory)


@pytest.mark.parametrize("how, reason", [("dies", "exit code 11"), ("hangs", "no answer")])
def test_the_next_model_has_its_turn(how, reason, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 3.0)
    monkeypatch.setattr(run, "WAITING", 1.0)
    found = _go(recipes, tmp_path, "second", how)
    assert list(found) == list(NAMES)
    assert set(found["first"].status.values()) == {"placed"}
    seen = "crashed" if how == "dies" else "waiting"
    crashed = {"zigzag": "placed", "shuffled": seen, "eplb": seen}
    assert found["second"].built and found["second"].status == crashed
    assert found["second"].reasons["eplb"] == (
        reason if how == "dies" else "waits for the other rank"
    )
    assert not found["third"].built and found["third"].reason == reason


def test_ranks_that_ask_for_it_are_started_again_and_nothing_is_lost(recipes, tmp_path):
    found = _go(recipes[:2], tmp_path, "", "again")
    assert [set(found[name].status.values()) for name in NAMES[:2]] == [{"placed"}] * 2


@pytest.mark.parametrize("status, waits", [("refused", False), ("failed", False), ("placed", True)])
def test_nobody_waits_long_for_a_rank_that_was_refused(
    status, waits, recipes, tmp_path, monkeypatch
):
    """A draft whose replicas are on one rank only is refused there.

    The other waits in EPLB for an answer.
    """
    monkeypatch.setattr(run, "WAITING", 4.0)
    monkeypatch.setattr(run, "WAITING_IN_VAIN", 0.5)
    context = multiprocessing.get_context("fork")

    def ends(left, file):
        for recipe, strategy in left:
            line = {"name": recipe.name, "strategy": strategy, "status": status, "reason": ""}
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            time.sleep(600)

    def make(left, attempt):
        files = [tmp_path / run.FILES[member] for member in (1, 2)]
        return [
            context.Process(target=ends, args=(left, files[0])),
            context.Process(target=time.sleep, args=(600,)),
        ]

    crew, began = run.Crew([1, 2], [(recipes[0], "eplb")], tmp_path, make), time.monotonic()
    while crew.working():
        time.sleep(0.01)
    assert (time.monotonic() - began > 3) == waits
    last = (tmp_path / run.FILES[2]).read_text().splitlines()[-1]
    assert json.loads(last)["status"] == "waiting"


def _lines(status):
    line = {"name": "m", "status": status, "reason": ""}
    return [line | {"strategy": strategy} for strategy in ranks.STRATEGIES]


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
    for file, lines in zip(run.FILES.values(), ([alone], *map(_lines, ranks_saw))):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(outcome.read(tmp_path)["m"].status.values()) == {expected}
