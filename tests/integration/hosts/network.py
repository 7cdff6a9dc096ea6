"""Make hosts on this machine: namespaces with an address, a name and a link of their own.

scripts/hosts.sh makes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "hosts.sh"


def why_not() -> str | None:
    """Return why hosts cannot be made here; None when they can."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"moe-probe-{os.getpid()}"  # two tests may run at once
    tried = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return (
        None
        if tried.returncode == 0
        else f"network namespaces cannot be made here: {tried.stderr.strip()}"
    )


class Hosts:
    """Make hosts ``NAME0``, ``NAME1``, ... that reach each other and nothing else."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count
        self.call("up", count)

    def call(self, action: str, *arguments: object) -> str:
        """Run one action of the script; return what it wrote."""
        done = subprocess.run(self.command(action, *arguments), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(self, action: str, *arguments: object) -> list[str]:
        """Return an action of the script as a command."""
        return [str(SCRIPT), action, self.name, *map(str, arguments)]

    def on(self, number: int, command: Sequence[str]) -> list[str]:
        """Return a command that runs on host ``number``."""
        return self.command("exec", number, *command)

    def address(self, number: int) -> str:
        """Return the address of host ``number``."""
        return f"10.77.0.{number + 1}"

    def link(self, number: int, state: str) -> None:
        """Pull the cable of a host (``down``) or put it back (``up``)."""
        self.call("link", number, state)

    def traffic(self, number: int) -> tuple[int, int]:
        """Return (bytes received, bytes sent) over the host's interface so far."""
        received, sent = self.call("bytes", number).split()
        return int(received), int(sent)

    def down(self) -> None:
        """Take all of it away."""
        self.call("down")


def made(name: str, count: int = 2) -> Iterator[Hosts]:
    """Make hosts for fixtures, or skip the test and say why there are none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    hosts = Hosts(f"{name}-{os.getpid()}-", count)
    try:
        yield hosts
    finally:
        hosts.down()
