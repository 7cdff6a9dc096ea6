"""Tell which host this is, and which ranks share one."""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def host_key() -> str:
    """Return what the ranks of one host have in common and those of different hosts have not.

    As in NCCL: the host's name with the boot's id, or ``NCCL_HOSTID`` where that is set. Containers
    with names of their own count as hosts: nothing says that what joins them is faster than the
    network.
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
    """Find this host's own address on the way to ``host``; empty when there is no way.

    No packet is sent.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return ""


def innermost_store(store: Any) -> Any:
    """Unwrap a torch.distributed store from those that put prefixes before its keys."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def address_towards_store(store: Any) -> str:
    """Find this host's own address on the way to the process that holds a store.

    Args:
        store: of torch.distributed; one in a file joins the ranks of one machine only.
    """
    host = getattr(innermost_store(store), "host", None)
    return "127.0.0.1" if host is None else address_towards(host)


def number_hosts(keys: Sequence[Hashable]) -> tuple[int, ...]:
    """Number the hosts of ranks in the order of their first rank, int ``[ranks]``.

    Args:
        keys: of each rank, the same for those of one host.
    """
    seen: dict[Hashable, int] = {}
    return tuple(seen.setdefault(key, len(seen)) for key in keys)


def ranges(numbers: Sequence[int]) -> str:
    """Write ``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
