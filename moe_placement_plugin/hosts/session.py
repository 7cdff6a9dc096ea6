"""Do a worker's part about the other hosts, between joining the process group and loading weights.

It is the same in both engines. One session is open in a process at a time.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import util
from typing import Any

from .._version import __version__
from ..core.topology import Topology
from .handshake import WAIT, Agreement, Statement, agree
from .identity import address_towards_store, host_key, number_hosts
from .watch import HostWatch, end_process, own_connection


@dataclass
class _Session:
    """Hold what this process's ranks agreed on, and its watch over the other hosts."""

    agreement: Agreement | None = None
    watch: HostWatch | None = None


_session = _Session()


def agreed() -> Agreement | None:
    """Return what this process's ranks agreed on; None on one host, or before."""
    return _session.agreement


def host_names() -> str | None:
    """List the hosts for a recording, ``"2: name (address), ranks 0-3; ..."``; None on one host."""
    if _session.agreement is None:
        return None
    names = _session.agreement.names()
    return f"{len(names)}: {'; '.join(names)}"


def topology(ranks: Sequence[int]) -> Topology | None:
    """Give the nodes of an EP group, as its ranks said themselves; None where nobody was asked.

    Args:
        ranks: of the EP group within the process group of all hosts, in the group's order.
    """
    if _session.agreement is None:
        return None
    nodes = _session.agreement.node_of_rank
    return Topology(len(ranks), number_hosts([nodes[rank] for rank in ranks]))


def open_session(
    facts: Mapping[str, Any],
    parcel: Mapping[str, Any] | None,
    timeout: float,
    log: logging.Logger,
    name_rank: Callable[[int], str],
    end: Callable[[str], None] | None = None,
) -> Agreement:
    """Agree with all ranks of the default process group, and watch the other hosts from then on.

    Args:
        facts: the fields of `Statement` that the engine knows: engine, strategy, digest, source,
            rules, error.
        parcel: this rank's placement (`packed.pack`), of which rank 0's travels.
        timeout: seconds after which a silent host counts as gone.
        log: the engine's logger.
        name_rank: says where a rank that is not heard of must lie.
        end: ends this process with a message, from a thread; `end_process` when left out.

    Raises:
        PlacementError: on every rank alike, when they do not agree.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    statement = Statement(
        rank=rank,
        host=socket.gethostname(),
        address=address_towards_store(store),
        key=host_key(),
        plugin=__version__,
        **facts,
    )
    agreement = agree(store, statement, ranks, parcel, min(timeout, WAIT), name_rank)
    _session.agreement = agreement
    if rank == 0:
        log.info("moe_placement_plugin: %s", agreement)
    nodes = agreement.node_of_rank
    if len(set(nodes)) > 1 and nodes.index(nodes[rank]) == rank:
        _session.watch = HostWatch(
            own_connection(store, timeout),
            nodes[rank],
            agreement.names(),
            timeout=timeout,
            end=end or partial(end_process, log=log),
        ).start()
        # Last of all: what others do at the end may take seconds, in which this host still lives.
        util.Finalize(None, close_session, exitpriority=0)
    return agreement


def close_session() -> None:
    """Forget the other hosts, and stop watching them: this process is about to end by itself."""
    if _session.watch is not None:
        _session.watch.stop()
    _session.agreement = _session.watch = None


def warn_about_nodes(
    planned: Sequence[int] | None, real: Topology | None, log: logging.Logger
) -> None:
    """Warn when a plan was made for ranks that lie on other nodes than they do.

    Args:
        planned: node of each rank that the plan was made for, None when it does not say.
        real: as the ranks said themselves, None on one host.
        log: the engine's logger.
    """
    if planned is None or real is None:
        return
    if number_hosts(planned) != real.node_of_rank:
        log.warning(
            "moe_placement_plugin: the plan was made for EP ranks on nodes %s, they lie on %s: "
            "more tokens cross between hosts than planned for; plan again with `moe-placement "
            "plan --nodes`",
            list(planned),
            list(real.node_of_rank),
        )
