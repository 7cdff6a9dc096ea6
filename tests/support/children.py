"""Running engines in child processes: one at a time on this machine, with timeouts, ended by process group.

Engines kill their caller when they die and need all cores, so none ever runs inside pytest and two
suites take turns through a lock file.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = Path(tempfile.gettempdir()) / "moe-placement-engine.lock"


_held = False


@contextmanager
def engine_lock() -> Iterator[None]:
    """Hold the machine's engine lock; who holds it may take it once more."""
    global _held
    if _held:
        yield
        return
    with open(LOCK, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        _held = True
        try:
            yield
        finally:
            _held = False


@dataclass(frozen=True)
class Finished:
    """What a child process left behind.

    Attributes:
        code: exit code, negative for a signal, None when it ran out of time and was ended.
        output: its standard output and error, in order.
    """

    code: int | None
    output: str


def end_group(process: subprocess.Popen) -> None:
    """End a child that leads a process group, and everything it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue


def run_child(
    command: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run a command to its end, or to ``timeout`` seconds.

    ``env`` is added to this process's environment; a value of "" removes nothing and sets the empty string.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
        log.seek(0)
        return Finished(code, log.read().decode(errors="replace"))


def python_path(*folders: Path | str) -> str:
    """``PYTHONPATH`` for a child: some folders, this repository, what this process was given."""
    return os.pathsep.join(map(str, filter(None, [*folders, ROOT, os.environ.get("PYTHONPATH")])))


def python(*arguments: str) -> list[str]:
    """A command that runs this interpreter."""
    return [sys.executable, *arguments]
