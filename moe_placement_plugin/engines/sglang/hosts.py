"""Let the schedulers of several hosts agree before weights load, and find their topology.

The topology is the one that they lie on.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from ...core.topology import Topology
from ...formats.packed import pack, unpack
from ...hosts import session
from ...hosts.watch import JoinWatch, end_process
from ..common.settings import Settings
from .hook_registry import Hook
from .state import STATE, placing

logger = logging.getLogger(__name__)


def agree(settings: Settings) -> Settings:
    """Agree with the schedulers of all hosts.

    The head's placement is taken where this host has none.

    Returns:
        The settings from now on, which are this process's.

    Raises:
        PlacementError: on every rank alike, when they do not agree.
    """
    hosts, placement = settings.hosts, settings.placement
    if hosts is None or placement is None or session.agreed() is not None:
        return settings
    import sglang

    plan = placement.plan
    verified = settings.verification
    said = {
        "engine": f"SGLang {sglang.__version__}",
        "strategy": settings.strategy,
        "digest": None if hosts.adopts else "" if plan is None else plan.digest,
        "source": placement.source,
        "error": hosts.error,
        "rules": {
            "--expert-placement-verify": verified.level if verified.on else None,
            "--enable-eplb": settings.rebalancing.moves,
            "--expert-rebalance": settings.rebalancing.rules,
        },
    }
    parcel = {"plan": None if plan is None else pack(plan), "exact": placement.exact}
    found = session.open_session(
        said, parcel, hosts.timeout, logger, partial(_name_rank, hosts.nodes), _end
    )
    if hosts.adopts:
        assert found.parcel is not None, "the head always sends one"
        sent = found.parcel["plan"]
        settings = settings.adopting(unpack(sent), found.parcel["exact"])
        STATE.settings = settings
    assert settings.plan is not None, "all ranks have agreed on it"
    session.warn_about_nodes(settings.plan.metadata.get("node_of_rank"), real_topology(), logger)
    return settings


def real_topology() -> Topology | None:
    """Return the EP ranks and the nodes that they said they lie on; None on one host."""
    if session.agreed() is None:
        return None
    from sglang.srt.distributed.parallel_state import get_moe_ep_group

    return session.topology(get_moe_ep_group().ranks)


def _name_rank(nodes: int, rank: int) -> str:
    import torch.distributed as dist

    return (
        f"the host with --node-rank {rank // max(1, dist.get_world_size() // nodes)} (rank {rank})"
    )


def _end(message: str) -> None:
    """End this scheduler and, as SGLang does itself when a scheduler fails, its launcher."""
    logger.critical("moe_placement_plugin: %s", message)
    os.kill(os.getppid(), signal.SIGQUIT)
    end_process("this scheduler ends", logger)


def join(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `ModelRunner.init_torch_distributed`, and end the wait for hosts that do not come."""
    settings = placing()
    hosts = None if settings is None else settings.hosts
    if hosts is None or session.agreed() is not None:
        return original(self, *args, **kwargs)
    what = f"the other hosts of --nnodes {hosts.nodes} to join"
    with JoinWatch(what, 10 * hosts.timeout, _end, logger.warning):
        return original(self, *args, **kwargs)


def host_hooks() -> list[Hook]:
    """Return what a worker of several hosts gets besides."""
    return [
        Hook(
            name="hosts",
            target="sglang.srt.model_executor.model_runner:ModelRunner.init_torch_distributed",
            hook=join,
            relies_on=("self",),
            why="a host that does not come is waited for without a word until SGLang's own timeout",
            removable_when="SGLang says what it waits for, and notices a host that vanishes",
            optional=True,
        ),
    ]
