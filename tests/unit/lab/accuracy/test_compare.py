"""Test results of lm-eval, made up and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.lab.accuracy.compare import Allowance, compare
from moe_placement_plugin.lab.accuracy.results import read_results
from moe_placement_plugin.lab.accuracy.run import STOCK, Run, Verdict, configurations
from moe_placement_plugin.lab.accuracy.table import table, to_json
from moe_placement_plugin.lab.servers.engines import SERVING_ENGINES, Placed

TEXTS = ["280", "132", "007", "991"]
STRICT = Allowance()
CHOICES = [[-0.1, -5.0, -6.0], [-7.0, -0.2, -4.0]]


def write(
    folder: Path, texts=TEXTS, choices=CHOICES, score=0.75, prompt="p", stderr: object = 0.25
) -> Path:
    """Write results and samples in the form of lm-eval 0.4.13."""
    place = folder / "tiny"
    place.mkdir(parents=True)
    results = {
        "sum": {
            "alias": "sum",
            "exact_match,strict": score,
            "exact_match_stderr,strict": stderr,
            "exact_match,loose": 1.0,
            "sample_len": 4,
        },
        "pick": {"alias": "pick", "acc,none": 0.5, "acc_stderr,none": "N/A"},
    }
    configs = {"sum": {"output_type": "generate_until"}, "pick": {"output_type": "multiple_choice"}}
    (place / "results_2026.json").write_text(json.dumps({"results": results, "configs": configs}))
    rows = [
        # One line for each filter.
        {
            "doc_id": i,
            "prompt_hash": f"{prompt}{i}",
            "filter": name,
            "resps": [[text]],
            "filtered_resps": [text],
        }
        for i, text in enumerate(texts)
        for name in ("strict", "loose")
    ]
    (place / "samples_sum_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {
            "doc_id": i,
            "prompt_hash": f"c{i}",
            "filter": "none",
            "resps": [[[str(value), "False"]] for value in values],
        }
        for i, values in enumerate(choices)
    ]
    (place / "samples_pick_2026.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def stock(tmp_path):
    return read_results(write(tmp_path / "stock"))


def compared(stock, tmp_path, allowance=STRICT, **changed):
    return compare(stock, read_results(write(tmp_path / "placed", **changed)), allowance)


def test_reading(stock):
    assert (
        stock["sum"].scores["exact_match,strict"].value == 0.75
        and stock["sum"].scores["exact_match,strict"].stderr == 0.25
    )
    assert stock["sum"].scores.keys() == {"exact_match,strict", "exact_match,loose"}
    assert [answer.text for answer in stock["sum"].answers.values()] == TEXTS
    assert math.isnan(stock["pick"].scores["acc,none"].stderr)
    assert [(a.text, a.logprobs) for a in stock["pick"].answers.values()] == [
        ("0", (-0.1, -5.0, -6.0)),
        ("1", (-7.0, -0.2, -4.0)),
    ]


def test_equal_runs_pass(stock, tmp_path):
    found = compared(stock, tmp_path)
    assert all(
        task.passed and not task.differing_answers and not task.differing_logprobs
        for task in found.values()
    )
    assert found["sum"].questions == 4 and found["pick"].questions == 2
    assert found["sum"].metrics["exact_match,strict"].difference == 0


def test_a_differing_answer_fails_even_where_the_score_is_equal(stock, tmp_path):
    found = compared(stock, tmp_path, texts=["280", "132", "008", "991"])["sum"]
    assert (
        found.differing_answers == 1 and found.examples == ((2, "007", "008"),) and not found.passed
    )
    assert all(metric.passed for metric in found.metrics.values())
    assert compared(
        stock, tmp_path / "allowed", Allowance(answers=1), texts=["280", "132", "008", "991"]
    )["sum"].passed


def test_a_lower_and_a_higher_score_fail(stock, tmp_path):
    for score in (0.5, 1.0):
        found = compared(stock, tmp_path / str(score), score=score)["sum"]
        assert not found.passed and found.metrics["exact_match,strict"].difference == score - 0.75
    assert compared(stock, tmp_path / "allowed", Allowance(score=0.25), score=0.5)["sum"].passed
    assert not compared(stock, tmp_path / "not", Allowance(score=0.24), score=0.5)["sum"].passed


def test_log_probabilities(stock, tmp_path):
    near = [[-0.1, -5.0, -6.0005], [-7.0, -0.2, -4.0]]
    found = compared(stock, tmp_path / "near", choices=near)["pick"]
    assert (
        found.passed
        and found.differing_logprobs == 0
        and found.largest_logprob_difference == pytest.approx(0.0005)
    )
    far = [[-0.1, -5.0, -6.5], [-7.0, -0.2, -4.0]]
    found = compared(stock, tmp_path / "far", choices=far)["pick"]
    assert not found.passed and (found.differing_answers, found.differing_logprobs) == (0, 1)
    flipped = [[-0.1, -5.0, -6.0], [-7.0, -4.0, -0.2]]
    found = compared(stock, tmp_path / "flipped", choices=flipped)["pick"]
    assert (found.differing_answers, found.differing_logprobs) == (1, 1) and found.examples == (
        (1, "1", "2"),
    )


@pytest.mark.parametrize("bad, differing", [(math.nan, 1), (-math.inf, 1)])
def test_numbers_that_are_none_differ(stock, tmp_path, bad, differing):
    found = compared(
        stock, tmp_path, Allowance(answers=None), choices=[[-0.1, -5.0, bad], [-7.0, -0.2, -4.0]]
    )["pick"]
    assert found.differing_logprobs == differing and found.largest_logprob_difference == math.inf


def test_rounding_may_flip_answers_outside_float32(stock, tmp_path):
    allowance = Allowance.for_dtype("bfloat16")
    assert compared(stock, tmp_path / "a", allowance, texts=["1", "2", "3", "4"], score=0.25)[
        "sum"
    ].passed
    assert not compared(stock, tmp_path / "b", allowance, score=0.2)["sum"].passed
    # Without a standard error nothing says what noise is.
    unknown = read_results(write(tmp_path / "c", stderr="N/A"))
    assert not compare(unknown, read_results(write(tmp_path / "d", score=0.74)), allowance)[
        "sum"
    ].passed
    assert Allowance.for_dtype("float32") == Allowance(0.0, 0, 1e-3)


def test_other_questions_are_not_compared(stock, tmp_path):
    with pytest.raises(
        PlacementError, match="task sum: the runs asked different questions .4 and 4, 0 in common"
    ):
        compared(stock, tmp_path / "prompts", prompt="q")
    with pytest.raises(PlacementError, match="4 and 3, 3 in common"):
        compared(stock, tmp_path / "fewer", texts=TEXTS[:3])
    with pytest.raises(PlacementError, match="different tasks"):
        compare(stock, {"sum": stock["sum"]}, Allowance())


def test_results_without_samples_are_refused(tmp_path):
    folder = write(tmp_path / "run")
    (folder / "tiny" / "samples_sum_2026.jsonl").unlink()
    with pytest.raises(
        PlacementError, match="no samples of task sum: run lm-eval with --log_samples"
    ):
        read_results(folder)
    with pytest.raises(PlacementError, match="holds 0 results of lm-eval"):
        read_results(tmp_path / "empty")


def test_report(stock, tmp_path):
    found = compared(stock, tmp_path, texts=["280", "132", "008", "991"], score=0.5)
    verdict = Verdict(
        {STOCK: Run(stock, 1, 1, ""), "zigzag": Run(stock, 1, 1, "zigzag in force")},
        {"zigzag": found},
    )
    console = Console(width=150)
    with console.capture() as shown:
        console.print(table(verdict))
    rows = [line.split() for line in shown.get().splitlines()]
    assert ["zigzag", "0.5000", "-0.2500", "0.2500", "1", "-", "-", "DIFFERENT"] in rows
    assert ["zigzag", "0.5000", "+0.0000", "-", "0", "0", "0.0e+00", "equal"] in rows
    data = json.loads(json.dumps(to_json(verdict)))
    assert not verdict.passed and data["passed"] is False
    assert (
        data["comparisons"]["zigzag"]["sum"]["differing_answers"] == 1
        and data["comparisons"]["zigzag"]["pick"]["passed"]
    )
    assert (
        data["comparisons"]["zigzag"]["sum"]["metrics"]["exact_match,strict"]["difference"] == -0.25
    )


def test_configurations(tmp_path):
    load = tmp_path / "load"
    found = configurations(["zigzag", "eplb", "eplb+4", "zigzag+0"], 2, 2, load)
    assert [c.name for c in found] == [STOCK, "zigzag", "eplb", "eplb+4", "zigzag+0"]
    assert [c.placed and (c.placed.redundant, c.placed.file) for c in found] == [
        None,
        (2, None),
        (2, load),
        (4, load),
        (0, None),
    ]
    for wrong, message in (
        (
            ["eplb"],
            "strategy eplb places experts by a recorded load and has none: add "
            "--expert-placement-file",
        ),
        (["zigzag", "zigzag"], "names zigzag twice"),
        (["zigzag+x"], "a number of redundant experts follows the ."),
        (["zigzags"], "zigzags"),
    ):
        with pytest.raises(PlacementError, match=message):
            configurations(wrong, 2, 0, None)


def test_server_commands():
    model, file = Path("model"), Path("load")
    placed = Placed("eplb", 4, file, 4)
    command, _ = SERVING_ENGINES["vllm"].command(model, 1, placed)
    eplb = json.loads(command[command.index("--eplb-config") + 1])
    assert (
        "--enable-eplb" in command
        and eplb["num_redundant_experts"] == 4
        and eplb["step_interval"] >= 10**9
    )
    assert (
        "--enable-eplb" not in SERVING_ENGINES["vllm"].command(model, 1, Placed("eplb", 4, file))[0]
    )
    command, env = SERVING_ENGINES["sglang"].command(model, 1, placed)
    words = " ".join(command)
    assert (
        "--tp-size 4" in words
        and "--ep-size 4" in words
        and "--ep-num-redundant-experts 4" in words
        and "--device cpu" in words
    )
    assert (
        "--expert-placement-strategy eplb --expert-placement-file load" in words
        and "SGLANG_PLUGINS" not in env
    )
    assert len(env["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 4
    for name, off in (("vllm", ("VLLM_PLUGINS", "")), ("sglang", ("SGLANG_PLUGINS", "none"))):
        command, env = SERVING_ENGINES[name].command(model, 1, None)
        assert (
            not any(
                "expert" in word or "tp-size" in word or "tensor-parallel" in word
                for word in command
            )
            and off in env.items()
        )
