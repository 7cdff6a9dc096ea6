"""Start, watch and end a server in a child process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ...core.errors import PlacementError


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


REFUSED = re.compile(r"\b(?:PlacementError|moe_placement_plugin\.(?:\w+\.)*[A-Z]\w*): (.+)")
"""An error of ours and why, which an engine prints far above its own last words."""


def _exit_on_sigterm() -> None:
    """Leave this process's ``with`` blocks when it is terminated, where nobody else decided that.

    Python's default ends it at once, and its servers would go on without it.
    """
    here = threading.current_thread() is threading.main_thread()
    if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """Run an engine's OpenAI server, in a process group that ends with the ``with`` block.

    Args:
        command: the server's command line.
        port: the port it will listen on.
        env: variables added to this process's environment.
        log: file for its output.
        start_timeout: seconds until it must answer.
        progress: called about once a second while it starts, with seconds waited and the last line
            of output.
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
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Return the server's base URL."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        _exit_on_sigterm()
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
            self._wait_until_ready(self.process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        while (waited := time.monotonic() - began) < self.start_timeout:
            if process.poll() is not None:
                raise PlacementError(
                    f"the server ended with code {process.returncode} before it was "
                    f"ready{self._why()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            self.progress(waited, self.tail(1))
            time.sleep(1)
        raise PlacementError(
            f"the server was not ready after {self.start_timeout:.0f} s{self._why()}"
        )

    def _why(self) -> str:
        """Return what its output says of a start that failed."""
        reason = REFUSED.search(self.output())
        return (f": {reason.group(1).strip()}\n" if reason else ":\n") + self.tail(25)

    def output(self) -> str:
        """Return all that it wrote so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int) -> str:
        """Return the last lines of its output."""
        return "\n".join(self.output().rstrip().splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and everything it started.

        It may be called from another thread than the one that waits for it to start.
        """
        process, self.process = self.process, None
        if process is None:
            return
        ways = [(signal.SIGINT, 20), (signal.SIGTERM, 10), (signal.SIGKILL, 10)]
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # As under nohup or in a shell's background: what is started from here ignores it too.
            ways.pop(0)
        for how, patience in ways:
            if not _signal_group(process.pid, how):
                break
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _signal_group(process.pid, 0):
                process.poll()  # reaps the leader, which would keep the group alive as a zombie
                time.sleep(0.2)
        process.wait(timeout=10)


def _signal_group(group: int, how: int) -> bool:
    """Signal a process group; return whether it still existed."""
    try:
        os.killpg(group, how)
        return True
    except ProcessLookupError:
        return False
