"""Test ``moe-placement verify accuracy`` with the real lm-eval and made-up servers.

They also test what it says to bad input.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from moe_placement_plugin.cli import verify
from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.engines.common import installed
from moe_placement_plugin.lab.servers import engines
from moe_placement_plugin.lab.servers.engines import ServingEngine

from .accuracy import TASKS, TINY

QWEN = TINY / "qwen3-moe"


class MadeUp(ServingEngine):
    """Answer from the task files, under a strategy with its ``faults``."""

    name = "vllm"
    faults: dict[str, list[str]] = {}

    def command(self, model, port, placed, settings=None):
        faults = [] if placed is None else self.faults[placed.strategy]
        return [
            sys.executable,
            str(Path(__file__).with_name("openai_server.py")),
            str(port),
            str(TASKS),
            str(model),
            *faults,
        ], {}

    def _complete(self, url, model, prompt, tokens, alternatives):
        raise AssertionError("the accuracy check does not ask for single completions")


@pytest.fixture
def verified(tmp_path, monkeypatch, capsys):
    """Run the verb with made-up servers: exit code, JSON, printed text."""
    pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")
    import typer

    engine = MadeUp()
    monkeypatch.setitem(engines.SERVING_ENGINES, "vllm", engine)
    monkeypatch.setattr(installed, "find_spec", lambda name: object() if name == "vllm" else None)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def run(faults: dict[str, list[str]], tasks: str):
        engine.faults = faults
        code = 0
        strategies = ",".join(faults)
        arguments = {
            "strategies": strategies,
            "limit": 4,
            "include_path": TASKS,
            "engine": "vllm",
            "device": "cpu",
        }
        try:
            verify.accuracy(
                model=QWEN,
                tasks=tasks,
                json_path=tmp_path / "found.json",
                keep=tmp_path / "kept",
                **arguments,
            )
        except typer.Exit as exit_:
            code = exit_.exit_code
        return code, json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_differing_answers_are_found_by_lm_eval(verified):
    """An equal server passes; wrong texts and shifted log probabilities are counted.

    They end with exit code 1.
    """
    first = json.loads((TASKS / "sum.jsonl").read_text().splitlines()[0])
    code, found, text = verified(
        {"linear": [], "zigzag": ["wrong", first["prompt"]], "balanced": ["shift", "-0.01"]},
        "tiny_moe",
    )
    assert code == 1 and not found["passed"] and "DIFFERENT" in text
    scores = found["runs"]["stock"]["scores"]
    assert len(scores) == 7 and all(
        metric["value"] == 1.0 for task in scores.values() for metric in task.values()
    )
    linear, zigzag, balanced = (
        found["comparisons"][name] for name in ("linear", "zigzag", "balanced")
    )
    assert all(
        task["passed"] and task["questions"] == 4 and not task["differing_answers"]
        for task in linear.values()
    )
    assert zigzag["tiny_moe_sum"]["differing_answers"] == 1 and not zigzag["tiny_moe_sum"]["passed"]
    assert zigzag["tiny_moe_sum"]["metrics"]["exact_match,none"]["difference"] == -0.25
    assert zigzag["tiny_moe_sum"]["examples"] == [[0, first["answer"], first["answer"][::-1] + "0"]]
    assert zigzag["tiny_moe_brackets_choice"]["passed"] and zigzag["tiny_moe_sort"]["passed"]
    assert balanced["tiny_moe_sum"]["passed"]
    assert (
        balanced["tiny_moe_brackets_choice"]["differing_logprobs"] == 4
        and not balanced["tiny_moe_brackets_choice"]["passed"]
    )
    assert balanced["tiny_moe_brackets_choice"]["metrics"]["acc,none"]["difference"] == 0


@pytest.mark.parametrize(
    "code, message",
    [
        ("raise ValueError('unknown task x: name another')", "^unknown task x: name another$"),
        ("raise KeyError('x')", "^KeyError: 'x'$"),
        (
            "import os; print('out of memory', flush=True); os._exit(3)",
            "lm-eval ended with code 3:\nout of memory",
        ),
        (
            "import time; time.sleep(60)",
            "lm-eval was not ready after 1 s: give it more with --timeout",
        ),
    ],
)
def test_what_lm_eval_says_reaches_the_user(monkeypatch, tmp_path, code, message):
    """With a package called lm_eval that fails as lm-eval may."""
    from moe_placement_plugin.lab.accuracy import harness
    from moe_placement_plugin.lab.accuracy.examiner import Examination

    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    monkeypatch.setattr(harness, "LOADING_SECONDS", 1 if "sleep" in code else 60)
    with pytest.raises(PlacementError, match=message):
        with harness.Examiner(Examination(("x",)), True, tmp_path / "log", lambda s, line: None):
            pass


def test_bad_input_is_named(cli, tmp_path):
    def said(*arguments: object, model: object = QWEN, tasks: str = "tiny_moe") -> str:
        done = cli(
            "verify",
            "accuracy",
            "--model",
            model,
            "--tasks",
            tasks,
            "--device",
            "cpu",
            *arguments,
            code=2,
        )
        return done.stderr

    include = ("--include-path", TASKS)
    assert "has no config.json: give the folder of a checkpoint" in said(model=tmp_path)
    assert "--engine trt: choose one of vllm, sglang" in said("--engine", "trt")
    assert "add --expert-placement-file with a recorded load or a plan" in said(
        *include, "--strategies", "eplb"
    )
    assert "load does not exist: give a plan or a recorded load" in said(
        "--expert-placement-file", tmp_path / "load"
    )


def test_unknown_tasks_are_named(monkeypatch):
    tasks = pytest.importorskip(
        "lm_eval.tasks", reason="the extra `accuracy` is not installed here"
    )
    from moe_placement_plugin.lab.accuracy.examiner import Examination, find_tasks

    # Without lm-eval's own tasks, which take ten seconds to look through.
    monkeypatch.setattr(
        tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False)
    )
    assert find_tasks(Examination(("tiny_moe",), str(TASKS)))
    with pytest.raises(
        ValueError,
        match="unknown task 'tiny_moe_sums': `lm_eval ls tasks` lists those that lm-eval has$",
    ):
        find_tasks(Examination(("tiny_moe_sum", "tiny_moe_sums"), str(TASKS)))


def test_missing_lm_eval_and_folder_are_named(monkeypatch, tmp_path):
    from moe_placement_plugin.lab.accuracy import harness
    from moe_placement_plugin.lab.accuracy.examiner import Examination

    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else object())
    with pytest.raises(
        PlacementError,
        match=r"lm_eval is not installed .*pip install 'moe-placement-plugin\[accuracy\]'",
    ):
        with harness.Examiner(Examination(("a",)), True, tmp_path / "log", lambda s, line: None):
            pass
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    with pytest.raises(PlacementError, match="--include-path nowhere is no folder"):
        with harness.Examiner(
            Examination(("a",), "nowhere"), True, tmp_path / "log", lambda s, line: None
        ):
            pass


def test_documented_commands_are_spelt_right(monkeypatch):
    """Every option of `moe-placement` and `lm_eval` in the pages exists.

    Required ones are there.
    """
    from typer.main import get_command

    root = TINY.parents[1]
    text = "\n".join(
        (root / page).read_text()
        for page in ("docs/accuracy.md", "examples/gsm8k/README.md", "examples/tiny_moe/README.md")
    )
    commands = re.findall(
        r"^(?:    |\$ )(?:\w+=\w+ )?((?:moe-placement verify accuracy|lm_eval) .*)$",
        text.replace("\\\n", " "),
        re.M,
    )
    ours = [shlex.split(command)[3:] for command in commands if command.startswith("moe-placement")]
    theirs = [shlex.split(command)[1:] for command in commands if command.startswith("lm_eval")]
    assert len(ours) >= 6 and len(theirs) >= 4
    accuracy = get_command(verify.app).commands["accuracy"]
    for words in ours:
        accuracy.make_context("accuracy", list(words), resilient_parsing=False)
    pytest.importorskip("lm_eval", reason="the extra `accuracy` is not installed here")
    from lm_eval._cli.harness import HarnessCLI

    for words in theirs:
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *words])
        HarnessCLI().parse_args()
