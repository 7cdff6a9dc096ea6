"""Run the accuracy check as a user does, on the tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.children import engine_lock, python_path, run_child
from tests.support.paths import EXAMPLES
from tests.support.warm_workers import WARM_SITE

TINY = EXAMPLES / "tiny_moe"
TASKS = TINY / "tasks"


QUESTIONS = 8


def verify_accuracy(
    folder: Path, engine: str, strategies: tuple[str, ...]
) -> tuple[int | None, dict, str]:
    """Run ``moe-placement verify accuracy`` of the tiny Qwen3-MoE on two ranks.

    The servers are real; the machine's engine lock is held.

    Returns:
        Exit code, the JSON that it wrote (empty without one), and its output.
    """
    written = folder / "found.json"
    command = [
        sys.executable,
        "-c",
        "from moe_placement_plugin.cli import main; main()",
        "verify",
        "accuracy",
        "--engine",
        engine,
        "--model",
        str(TINY / "qwen3-moe"),
        "--tasks",
        "tiny_moe",
        "--include-path",
        str(TASKS),
        "--limit",
        str(QUESTIONS),
        "--strategies",
        ",".join(strategies),
        "--expert-placement-file",
        str(TINY / "loads" / "qwen3-moe.safetensors"),
        "--max-model-len",
        "64",
        "--json",
        str(written),
        "--keep",
        str(folder / "kept"),
    ]
    with engine_lock():
        finished = run_child(
            command, 1400, {"HF_HOME": str(folder / "hub"), "PYTHONPATH": python_path(WARM_SITE)}
        )
    return (
        finished.code,
        json.loads(written.read_text()) if written.exists() else {},
        finished.output,
    )


def check_every_strategy(folder: Path, engine: str, *strategies: str) -> None:
    """Check that every strategy is in force and gives stock's scores with no other answer.

    There are two ranks, and stock can do what it was trained for.
    """
    code, data, output = verify_accuracy(folder, engine, strategies)
    assert code == 0, output[-4000:]
    assert data["comparisons"].keys() == set(strategies)
    scores = data["runs"]["stock"]["scores"]
    assert len(scores) == 7 and all(
        score["value"] >= 0.75 for metrics in scores.values() for score in metrics.values()
    ), scores
    for strategy in strategies:
        assert strategy.partition("+")[0] in data["runs"][strategy]["placement"]
        assert data["comparisons"][strategy].keys() == scores.keys()
        for task, compared in data["comparisons"][strategy].items():
            assert compared["questions"] == QUESTIONS and compared["passed"], (
                strategy,
                task,
                compared,
            )
            assert (compared["differing_answers"], compared["differing_logprobs"]) == (0, 0)
            assert all(metric["difference"] == 0 for metric in compared["metrics"].values())
            # Two ranks add in another order than one: equality to the last bit would mean that
            # nothing was placed.
            assert 0 < compared["largest_logprob_difference"] < 1e-3 or not task.endswith("_choice")
    print(
        {
            name: (round(run["start_seconds"]), round(run["examine_seconds"]))
            for name, run in data["runs"].items()
        }
    )
