"""Run engines in child processes: two at a time, with timeouts, ended by process group.

Engines kill their caller when they die, so none ever runs inside pytest. Starting one takes a core
or so and a gigabyte or two: two suites side by side use two cores well, more would only wait for
each other, so that suites take turns through lock files.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT

LOCKS = [Path(tempfile.gettempdir()) / f"moe-placement-engine-{number}.lock" for number in (0, 1)]


_held = False


@contextmanager
def engine_lock() -> Iterator[None]:
    """Hold one of the machine's engine locks; who holds one may take it once more."""
    global _held
    if _held:
        yield
        return
    with ExitStack() as stack:
        handles = [stack.enter_context(open(path, "w")) for path in LOCKS]
        while not any(_locked(handle) for handle in handles):
            time.sleep(0.2)
        _held = True
        try:
            yield
        finally:
            _held = False


def _locked(handle) -> bool:
    """Take a lock file if nobody holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class Finished:
    """Hold what a child process left behind.

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

    ``env`` is added to this process's environment; a value of "" removes nothing and sets the empty
    string.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
        log.seek(0)
        return Finished(code, log.read().decode(errors="replace"))


def python_path(*folders: Path | str) -> str:
    """Return ``PYTHONPATH`` for a child: some folders, this repository, what was given."""
    return os.pathsep.join(map(str, filter(None, [*folders, ROOT, os.environ.get("PYTHONPATH")])))


def python(*arguments: str) -> list[str]:
    """Return a command that runs this interpreter."""
    return [sys.executable, *arguments]
