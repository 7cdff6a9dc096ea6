"""What the tests of the accuracy check share: the tiny models' folder, and the check run as a user does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support.children import engine_lock, run_child

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"
TASKS = TINY / "tasks"


def verify_accuracy(folder: Path, *arguments: object, timeout: float) -> tuple[int | None, dict, str]:
    """``moe-placement verify accuracy`` with real servers, holding the machine's engine lock.

    Returns:
        Exit code, the JSON that it wrote (empty without one), and its output.
    """
    written = folder / "found.json"
    command = [sys.executable, "-c", "from moe_placement_plugin.cli import main; main()", "verify", "accuracy"]
    given = [*map(str, arguments), "--include-path", str(TASKS), "--json", str(written), "--keep", str(folder / "kept")]
    with engine_lock():
        finished = run_child([*command, *given], timeout, {"HF_HOME": str(folder / "hub")})
    return finished.code, json.loads(written.read_text()) if written.exists() else {}, finished.output


def check_equal(found: tuple[int | None, dict, str], strategies: tuple[str, ...]) -> None:
    """Every strategy was in force and gives stock's scores with no differing answer, and stock can do what it was trained for."""
    code, data, output = found
    assert code == 0, output[-4000:]
    assert data["comparisons"].keys() == set(strategies)
    for task, metrics in data["runs"]["stock"]["scores"].items():
        for metric, score in metrics.items():
            assert score["value"] >= 0.75, (task, metric)
    for strategy in strategies:
        assert strategy.partition("+")[0] in data["runs"][strategy]["placement"]
        assert len(data["comparisons"][strategy]) == 7
        for task, compared in data["comparisons"][strategy].items():
            assert compared["questions"] == 8 and compared["passed"], (strategy, task, compared)
            assert (compared["differing_answers"], compared["differing_logprobs"]) == (0, 0)
            assert compared["largest_logprob_difference"] < 1e-3
            assert all(metric["difference"] == 0 for metric in compared["metrics"].values())
            # Two ranks add in another order than one, so equality to the last bit would mean that nothing was placed.
            assert compared["largest_logprob_difference"] > 0 or not task.endswith("_choice")
    print({name: (round(run["start_seconds"]), round(run["examine_seconds"])) for name, run in data["runs"].items()})
