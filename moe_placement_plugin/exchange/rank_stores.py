"""Keep a key-value store on every rank: an exchange can be agreed on whoever has died."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist


def own_address() -> str:
    """Return an address of this machine that the other ranks reach.

    That which leads to the default group's store.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    store = _unwrapped(_get_default_store())
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if host is None or port is None:  # a store in a file: all ranks on one machine
        return "127.0.0.1"
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def held_here(store: dist.Store) -> bool:
    """Whether a store ends with this process, to the harm of others.

    A clone of it, which is a connection, does not say so.
    """
    from torch.distributed import TCPStore

    # torch says it nowhere else: a connection to another process's store is shown with
    # server=<nullptr>.
    bare = _unwrapped(store)
    return isinstance(bare, TCPStore) and "server=<nullptr>" not in repr(bare)


def _unwrapped(store: Any) -> Any:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


class Stores:
    """Holds one store per rank of a group; a collective to make.

    Any one of them will do for an exchange in which its rank takes part: all must choose the same.

    Args:
        group: one that carries CPU tensors.
        timeout: seconds to reach a store.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float = 30.0):
        from datetime import timedelta

        import torch.distributed as dist

        self._timeout = timedelta(seconds=timeout)
        self._rank = group.rank()
        own = dist.TCPStore(
            "0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=self._timeout
        )
        found: list[Any] = [None] * group.size()
        dist.all_gather_object(found, (own_address(), own.port), group=group)
        self._addresses: list[tuple[str, int]] = found
        self._stores: dict[int, dist.Store] = {self._rank: own}

    def of(self, rank: int) -> dist.Store:
        """Return the store in the process of a rank that is alive.

        Raises:
            DistStoreError: when it does not answer.
        """
        if rank not in self._stores:
            import torch.distributed as dist

            host, port = self._addresses[rank]
            self._stores[rank] = dist.TCPStore(
                host, port, is_master=False, wait_for_workers=False, timeout=self._timeout
            )
        return self._stores[rank]
