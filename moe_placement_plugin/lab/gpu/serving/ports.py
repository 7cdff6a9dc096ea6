"""Find ports for servers that start side by side."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path

from ...servers.server import free_port

LOWEST = 20_000
APART = 16
"""From one server's port to the next one's: more than SGLang takes in a row."""
BEHIND = 233
"""How far behind its own SGLang with data-parallel attention takes seven more ports.

They are between two servers' own.
"""
CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""What Linux gives connections.

A client that looks each second whether each of eight servers is up leaves hundreds of those ports
unusable for a minute each, and SGLang, which derives ports from its own, gives up after half a
minute. One of five servers on two H200 did.
"""


def ports() -> Iterator[int]:
    """Find free ports below those of connections.

    They are far enough from each other for all that an engine derives from its own; another run on
    this host begins elsewhere.
    """
    try:
        end = int(CONNECTIONS.read_text().split()[0]) - BEHIND - APART
    except (OSError, ValueError):
        end = 0  # not Linux
    rows = range(LOWEST, end, APART)
    first = random.randrange(len(rows)) if rows else 0
    for port in (*rows[first:], *rows[:first]):
        if all(map(_free, (port, *range(port + BEHIND, port + BEHIND + 7)))):
            yield port
    while True:
        yield free_port()


def _free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
