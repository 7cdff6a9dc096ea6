"""Which host this is, and which ranks share one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def host_key() -> str:
    """What the ranks of one host have in common and those of different hosts have not.

    As in NCCL: the host's name with the boot's id, or ``NCCL_HOSTID`` where that is set. Containers with names of their
    own count as hosts: nothing says that what joins them is faster than the network.
    """
    given = os.environ.get("NCCL_HOSTID")
    if given:
        return given
    try:
        boot = _BOOT.read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def address_towards(host: str) -> str:
    """This host's own address on the way to ``host``; no packet is sent. Empty when there is no way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return ""


def number_hosts(keys: Sequence[str]) -> tuple[int, ...]:
    """Node index of each rank, int ``[ranks]``: hosts are numbered in the order of their first rank."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(key, len(seen)) for key in keys)


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
