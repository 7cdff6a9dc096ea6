"""Write vLLM's tables of docs/zoo.md: ``python -m tests.zoo.vllm.document [DIRECTORY]``.

The directory is of a run; else one is made.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.paths import DOCS
from tests.zoo import table
from tests.zoo.vllm import outcome
from tests.zoo.vllm.listed import NOT_IN_THE_ZOO
from tests.zoo.vllm.recipes import RECIPES

HEADER = ("class", "experts in the checkpoint", "zigzag", "shuffled plan", "EPLB + 2", "remark")


def render(outcomes: dict[str, outcome.Outcome]) -> dict[str, str]:
    """Name of a table -> its text."""
    listed = sorted(NOT_IN_THE_ZOO.items())
    return {
        "vllm": table.markdown(HEADER, outcome.rows(RECIPES, outcomes)),
        "vllm-not": table.markdown(("class", "why"), listed),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        directory = Path(sys.argv[1] if len(sys.argv) > 1 else made)
        if len(sys.argv) < 2:
            subprocess.run([sys.executable, "-m", "tests.zoo.vllm.run", made], check=True)
        table.replace(DOCS / "zoo.md", render(outcome.read(directory)))


if __name__ == "__main__":
    main()
