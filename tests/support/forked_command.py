"""Run ``moe-placement`` in a process forked from one that has imported it.

A command takes tens of milliseconds of work and a second of imports. What a user's own process
imports, and how long it takes, is tested with real ones (tests/unit/cli/test_verbs.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import forkserver


def run_command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the command to its end with this process's environment and folder."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        process = forkserver.context().Process(
            target=_command, args=(arguments, outputs, os.getcwd(), dict(os.environ)), daemon=True
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["moe-placement", *arguments], timeout)
        said = [Path(path).read_text() for path in outputs]
        return subprocess.CompletedProcess(list(arguments), process.exitcode, *said)


def _command(arguments, outputs, folder, environment) -> None:
    from moe_placement_plugin.cli import main

    for path, number in zip(outputs, (1, 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["moe-placement", *arguments]
    main()
