"""Share a store between threads and processes, as the ranks of several hosts do."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import PrefixStore, TCPStore

from moe_placement_plugin.hosts.handshake import Agreement, Statement, agree

server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
_runs = itertools.count()
_clients: list[TCPStore] = []


def connections(count: int) -> list[PrefixStore]:
    """Give as many connections to a store that nobody has written to.

    They are made once: torch looks up the name of whoever connects, which takes seconds where a
    name server is slow.
    """
    name = f"run-{next(_runs)}"
    while len(_clients) < count:
        _clients.append(TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False))
    return [PrefixStore(name, client) for client in _clients[:count]]


def statement(rank: int, host: int | None = None, **more) -> Statement:
    """State what a rank of a cluster serves whose hosts have two ranks each."""
    host = rank // 2 if host is None else host
    fields = {
        "plugin": "1.0",
        "engine": "vLLM 0.32.0",
        "strategy": "eplb",
        "digest": "d" * 64,
        "source": "/plans/plan.json",
    }
    return Statement(
        rank=rank,
        host=f"node{host}",
        address=f"10.0.0.{host + 1}",
        key=f"boot {host}",
        **fields | more,
    )


def all_agree(
    statements, parcels=None, wait: float = 20.0, ranks: int | None = None
) -> list[Agreement | Exception]:
    """Return what each of the ranks that speak gets, in their order."""
    ranks = len(statements) if ranks is None else ranks

    def one(store, mine):
        try:
            return agree(
                store,
                mine,
                ranks,
                (parcels or {}).get(mine.rank),
                wait,
                "the host of rank {}".format,
            )
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(statements)) as pool:
        return list(pool.map(one, connections(len(statements)), statements))
