"""Start Ray on each host of a test, and end it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.children import end_group, python_path

from .network import ROOT


def ray_path() -> str:
    """Return PYTHONPATH of Ray's processes."""
    return python_path(ROOT / "tests" / "support" / "ray_site")


def start_command(where: list[str], address: str, gpus: int) -> list[str]:
    """Return what starts a node of Ray; ``where`` are the options of the head, or of another."""
    options = f"--node-ip-address {address} --num-cpus 2 --num-gpus {gpus}"
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        *where,
        *options.split(),
        *("--object-store-memory", "100000000", "--block"),
    ]


def wait_until_started(process: subprocess.Popen, log: Path) -> None:
    """Wait up to a minute for a node; fail with the end of its log."""
    deadline = time.monotonic() + 60
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)


@contextmanager
def ray_nodes(folder: Path, starts: list[tuple[list[str], str]]) -> Iterator[tuple]:
    """Run Ray on each host; all of it is ended afterwards.

    ``starts`` has (what runs a command there, its address).

    Yields:
        (the head's address, a function that reads what the workers wrote: not all of it need have
        reached the driver by its end).
    """
    # Sockets lie in it, whose paths must be short.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    env = {**os.environ, "PYTHONPATH": ray_path(), "RAY_USAGE_STATS_ENABLED": "0"}
    processes: list[subprocess.Popen] = []
    head = f"{starts[0][1]}:6379"
    as_head = "--head --port 6379 --include-dashboard false --temp-dir".split()
    try:
        for number, (prefix, address) in enumerate(starts):
            where = [*as_head, str(temporary)] if number == 0 else ["--address", head]
            log = folder / f"ray{number}.log"
            processes.append(
                subprocess.Popen(
                    [*prefix, *start_command(where, address, 2 // len(starts))],
                    stdout=open(log, "w"),
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,
                )
            )
            wait_until_started(processes[-1], log)
        written = "session_2*/logs/worker-*"
        yield (
            head,
            lambda: "".join(f.read_text(errors="replace") for f in sorted(temporary.glob(written))),
        )
    finally:
        for process in reversed(processes):
            # On hosts of our own it is ended with them; here Ray takes half a minute to drain.
            if not starts[0][0]:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=60)
            end_group(process)
        shutil.rmtree(temporary, ignore_errors=True)
