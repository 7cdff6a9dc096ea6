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
