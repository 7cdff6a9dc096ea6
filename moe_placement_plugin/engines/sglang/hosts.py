"""SGLang over several hosts: what the schedulers agree on before weights load, and what topology they lie on."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...core.errors import PlacementError
from ...core.topology import Topology
from ...formats.packed import pack, unpack
from ...hosts import session
from ...hosts.watch import DEFAULT_TIMEOUT, JoinWatch, check_timeout, end_process
from ...strategies import get_strategy
from ...strategies.base import LOCALITIES
from ..common.host_flags import LOCALITY_FLAG, TIMEOUT_FLAG
from . import settings
from . import verification as loaded
from .hook_registry import Hook, HookSet

logger = logging.getLogger(__name__)


def settle(asked: settings.Settings, cfg: Any) -> None:
    """Note in ``asked`` what this host is among several, and whether it waits for the head's placement.

    Args:
        asked: the flags.
        cfg: SGLang's resolved arguments.

    Raises:
        PlacementError: naming the argument, the reason and the mend.
    """
    nodes = int(getattr(cfg, "nnodes", 1) or 1)
    if asked.host_timeout is not None:
        if nodes == 1:
            raise PlacementError(
                f"{TIMEOUT_FLAG} {asked.host_timeout:g} with --nnodes 1: there is no other host; leave it out"
            )
        asked.host_timeout = check_timeout(asked.host_timeout, TIMEOUT_FLAG)
    if asked.locality not in LOCALITIES:
        raise PlacementError(
            f"{LOCALITY_FLAG} {asked.locality}: choose one of {', '.join(LOCALITIES)}"
        )
    if asked.locality != "none" and bool(getattr(cfg, "enable_eplb", False)):
        raise PlacementError(
            f"{LOCALITY_FLAG} {asked.locality} with --enable-eplb, which has its own rule for groups and nodes: leave it out"
        )
    asked.nodes = nodes
    asked.adopts = nodes > 1 and int(cfg.node_rank) > 0 and _waits_for_head(asked, cfg)


def _waits_for_head(asked: settings.Settings, cfg: Any) -> bool:
    if asked.file is not None:
        return not Path(asked.file).exists()
    return get_strategy(asked.strategy).needs_load and not getattr(cfg, "enable_eplb", False)


def agree(asked: settings.Settings) -> None:
    """Agree with the schedulers of all hosts, and take the head's placement where this host has none.

    Raises:
        PlacementError: on every rank alike, when they do not agree.
    """
    if asked.nodes == 1 or session.agreed() is not None:
        return
    import sglang

    verification = loaded.current()
    said = {
        "engine": f"SGLang {sglang.__version__}",
        "strategy": asked.strategy,
        "digest": None
        if asked.adopts
        else ""
        if asked.placement is None
        else asked.placement.digest,
        "source": asked.file or "",
        "error": asked.error,
        "rules": {
            "--expert-placement-verify": None if verification is None else verification.level,
            "--enable-eplb": asked.moves,
            "--expert-rebalance": asked.rebalance,
        },
    }
    parcel = {"plan": None if asked.placement is None else pack(asked.placement)}
    found = session.open_session(
        said,
        parcel,
        asked.host_timeout or DEFAULT_TIMEOUT,
        logger,
        partial(_name_rank, asked.nodes),
        _end,
    )
    if asked.adopts:
        assert found.parcel is not None, "the head always sends one"
        asked.placement, asked.adopts = unpack(found.parcel["plan"]), False
    assert asked.placement is not None, "all ranks have agreed on it"
    session.warn_about_nodes(asked.placement.metadata.get("node_of_rank"), real_topology(), logger)


def real_topology() -> Topology | None:
    """EP ranks and the nodes that they said they lie on; None on one host."""
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
    """`ModelRunner.init_torch_distributed`, with an end to the wait for hosts that do not come."""
    asked = settings.current()
    if asked is None or asked.nodes == 1 or session.agreed() is not None:
        return original(self, *args, **kwargs)
    what = f"the other hosts of --nnodes {asked.nodes} to join"
    with JoinWatch(what, 10 * (asked.host_timeout or DEFAULT_TIMEOUT), _end, logger.warning):
        return original(self, *args, **kwargs)


@lru_cache(maxsize=1)
def hooks() -> HookSet:
    """What a worker of several hosts gets besides; the same object in every call."""
    return HookSet(
        [
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
    )
