"""What a worker process of either engine does about the other hosts, between joining the process group and loading weights."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..core.topology import Topology
from .handshake import WAIT, Agreed, Statement, agree
from .identity import address_towards, host_key
from .watch import HostWatch, end_process, own_connection

_agreed: Agreed | None = None
_watch: HostWatch | None = None


def agreed() -> Agreed | None:
    """What this process's ranks agreed on; None on one host, or before."""
    return _agreed


def host_names() -> str | None:
    """``"2: name (address), ranks 0-3; ..."`` for a recording; None on one host."""
    return None if _agreed is None else f"{len(_agreed.names())}: {'; '.join(_agreed.names())}"


def topology(ranks: Sequence[int]) -> Topology | None:
    """The nodes of an EP group, as its ranks said themselves; None where nothing was asked.

    Args:
        ranks: of the EP group within the process group of all hosts, in the group's order.
    """
    if _agreed is None:
        return None
    nodes = _agreed.node_of_rank
    numbers: dict[int, int] = {}
    return Topology(
        len(ranks), tuple(numbers.setdefault(nodes[rank], len(numbers)) for rank in ranks)
    )


def open_session(
    said: Mapping[str, Any],
    parcel: Mapping[str, Any] | None,
    timeout: float,
    log: logging.Logger,
    name_rank: Callable[[int], str],
    end: Callable[[str], None] | None = None,
) -> Agreed:
    """Agree with all ranks of the default process group, and watch the other hosts from then on.

    Args:
        said: the fields of `Statement` that the engine knows: engine, strategy, digest, source, rules, error.
        parcel: this rank's placement (`packed.pack`), of which rank 0's travels.
        timeout: seconds after which a silent host counts as gone.
        log: the engine's logger.
        name_rank: says where a rank that is not heard of must lie.
        end: ends this process with a message, from a thread; `end_process` when left out.

    Raises:
        PlacementError: on every rank alike, when they do not agree.
    """
    import torch.distributed as dist

    from .._version import __version__  # lazy: heavy

    global _agreed, _watch
    store, rank, ranks = (
        dist.distributed_c10d._get_default_store(),
        dist.get_rank(),
        dist.get_world_size(),
    )
    mine = Statement(
        rank=rank,
        host=socket.gethostname(),
        address=address_towards(_store_host(store)),
        key=host_key(),
        plugin=__version__,
        **said,
    )
    _agreed = agree(store, mine, ranks, parcel, min(timeout, WAIT), name_rank)
    if rank == 0:
        log.info("moe_placement_plugin: %s", _agreed)
    nodes = _agreed.node_of_rank
    if len(set(nodes)) > 1 and nodes.index(nodes[rank]) == rank:
        connection = own_connection(store, timeout)
        _watch = HostWatch(
            connection,
            nodes[rank],
            _agreed.names(),
            timeout=timeout,
            end=end or partial(end_process, log=log),
        ).start()
    return _agreed


def close_session() -> None:
    """Stop watching the others: this process is about to end by itself."""
    if _watch is not None:
        _watch.stop()


def warn_about_nodes(
    planned: Sequence[int] | None, real: Topology | None, log: logging.Logger
) -> None:
    """Say so when a plan was made for ranks that lie on other nodes than they do.

    Args:
        planned: node of each rank that the plan was made for, None when it does not say.
        real: as the ranks said themselves, None on one host.
    """
    if planned is None or real is None:
        return
    numbers: dict[int, int] = {}
    if tuple(numbers.setdefault(node, len(numbers)) for node in planned) != real.node_of_rank:
        log.warning(
            "moe_placement_plugin: the plan was made for EP ranks on nodes %s, they lie on %s: "
            "more tokens cross between hosts than planned for; plan again with `moe-placement "
            "plan --nodes`",
            list(planned),
            list(real.node_of_rank),
        )


def _store_host(store: Any) -> str:
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return getattr(store, "host", "localhost")
