"""A server in a child process: started, watched, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..errors import PlacementError


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """An engine's OpenAI server, in a process group of its own that ends with the ``with`` block.

    Args:
        command: the server's command line.
        port: the port it will listen on.
        env: variables added to this process's environment.
        log: file for its output.
        start_timeout: seconds until it must answer.
        progress: called about once a second while it starts, with seconds waited and the last line of output.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        env: Mapping[str, str],
        log: Path,
        start_timeout: float = 240,
        progress: Callable[[float, str], None] = lambda seconds, line: None,
    ):
        self.command, self.port, self.env, self.log = list(command), port, dict(env), log
        self.start_timeout, self.progress = start_timeout, progress
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Base URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        began = time.monotonic()
        while (waited := time.monotonic() - began) < self.start_timeout:
            if self.process.poll() is not None:
                raise PlacementError(f"the server ended with code {self.process.returncode} before it was ready:\n{self.tail(25)}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            self.progress(waited, self.tail(1))
            time.sleep(1)
        raise PlacementError(f"the server was not ready after {self.start_timeout:.0f} s:\n{self.tail(25)}")

    def tail(self, lines: int) -> str:
        """The last lines of its output."""
        text = self.log.read_text(errors="replace").rstrip() if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process is None:
            return
        for how, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            if not _signal_group(self.process.pid, how):
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _signal_group(self.process.pid, 0):
                self.process.poll()  # reaps the leader, which would keep the group alive as a zombie
                time.sleep(0.2)
        self.process.wait(timeout=10)
        self.process = None


def _signal_group(group: int, how: int) -> bool:
    """Whether the group still existed."""
    try:
        os.killpg(group, how)
        return True
    except ProcessLookupError:
        return False
