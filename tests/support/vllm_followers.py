"""Run an engine's parts on other hosts: each has a process that forks them.

It has imported vLLM (`tests.support.vllm_headless`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


class Followers:
    """Run the followers of the cases that name one.

    A follower is ``{"on": what runs a command on the host, "arguments", "env", "log"}``.

    The processes that fork them are started here, so that they import vLLM while the caller does.
    """

    def __init__(self, cases: Sequence[dict]):
        wanted = {
            tuple(case["follower"]["on"]): case["follower"] for case in cases if "follower" in case
        }
        self.hosts = {
            on: subprocess.Popen(
                [*on, sys.executable, "-m", "tests.support.vllm_headless"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **asked["env"]},
            )
            for on, asked in wanted.items()
        }

    @contextmanager
    def follow(self, case: dict) -> Iterator[None]:
        """Run the case's follower until the case ends; nothing where it names none."""
        if "follower" not in case:
            yield
            return
        asked = case["follower"]
        host = self.hosts[tuple(asked["on"])]
        print(json.dumps(asked), file=host.stdin, flush=True)
        group = int(host.stdout.readline())
        try:
            yield
            _gone(group, 15)  # it ends by itself when the head has ended
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError):
                    os.killpg(group, how)
                if _gone(group, 10):
                    break

    def end(self) -> None:
        """End the processes: nothing will be asked for any more."""
        for host in self.hosts.values():
            host.stdin.close()
            host.wait(timeout=10)


def _gone(group: int, seconds: float) -> bool:
    """Return whether a process group has ended within so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
