"""Run the zoo's launcher in a child process, and read what all cases' ranks said."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from tests.integration.sglang.engines import ENV, ROOT, threads
from tests.support.children import Finished, python, run_child

from . import checkpoints

LIMIT_S = 600


def launch(cases: list[dict[str, Any]], folder: Path) -> Finished:
    """Run cases.

    Args:
        cases: as `launcher` takes them.
        folder: for files; `results_in` reads them.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    more = {
        "SGLANG_CPU_OMP_THREADS_BIND": threads(2),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    files = (str(folder / name) for name in ("cases.json", "results.pickle"))
    command = python("-m", "tests.zoo.sglang.launcher", *files)
    return run_child(command, LIMIT_S, ENV | checkpoints.ENV | more, ROOT)


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each case's ranks said."""
    return pickle.loads((folder / "results.pickle").read_bytes())
