"""vLLM over several hosts: which host this is, what its workers agree on, and what topology they lie on."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from ...core.errors import PlacementError
from ...core.topology import Topology
from ...formats.packed import pack, unpack
from ...hosts import session
from ...hosts.watch import DEFAULT_TIMEOUT, JoinWatch, check_timeout, end_process
from ..common import options
from ..common.patching import Patch
from ..common.request import Request
from ..common.settings import HostSettings, Settings
from .state import STATE, Carried, carried_by

logger = logging.getLogger("vllm.moe_placement_plugin")


def spans_hosts(parallel: Any) -> bool:
    """Whether the ranks of a ``ParallelConfig`` may lie on several hosts."""
    return (
        resolves_on_every_host(parallel)
        or bool(parallel.use_ray)
        or getattr(parallel, "data_parallel_backend", "mp") == "ray"
    )


def resolves_on_every_host(parallel: Any) -> bool:
    """Whether every host reads the flags by itself; with Ray one process reads them for all."""
    if parallel.use_ray or getattr(parallel, "data_parallel_backend", "mp") == "ray":
        return False
    local = getattr(parallel, "data_parallel_size_local", None)
    external = parallel.distributed_executor_backend == "external_launcher"
    return (
        parallel.nnodes > 1
        or external
        or bool(local is not None and 0 < local < parallel.data_parallel_size)
    )


def is_head(parallel: Any) -> bool:
    """Whether this host has rank 0, whose placement holds for all."""
    if parallel.distributed_executor_backend == "external_launcher":
        import os

        return os.environ.get("RANK", "0") == "0"
    return parallel.node_rank == 0 and (parallel.data_parallel_rank or 0) == 0


def planned_topology(parallel: Any, ep_size: int) -> Topology:
    """EP ranks and the nodes that vLLM will put them on, before any of them exists.

    With ``--nnodes`` and with data parallel engines on several hosts every host has as many consecutive ranks. Ray decides later: one
    node is assumed then.
    """
    local = getattr(parallel, "data_parallel_size_local", None)
    nodes = parallel.nnodes
    if (
        nodes == 1
        and resolves_on_every_host(parallel)
        and local
        and parallel.data_parallel_size % local == 0
    ):
        nodes = parallel.data_parallel_size // local
    return Topology.even(ep_size, nodes) if ep_size % nodes == 0 else Topology(ep_size)


def real_topology() -> Topology | None:
    """EP ranks and the nodes that they said they lie on; None where the hosts were not asked."""
    if session.agreed() is None:
        return None
    from vllm.distributed.parallel_state import get_ep_group

    return session.topology(get_ep_group().ranks)


def _init_device(original):
    def init_device(self, *args, **kwargs):
        carried = carried_by(self.vllm_config)
        if carried is None or carried.settings.hosts is None:
            return original(self, *args, **kwargs)
        hosts = carried.settings.hosts
        parallel = self.vllm_config.parallel_config
        where = (
            f"the other hosts to join at {parallel.master_addr}:{parallel.master_port}"
            if parallel.nnodes > 1
            else "the other ranks to join"
        )
        with JoinWatch(where, 10 * hosts.timeout, partial(end_process, log=logger), logger.warning):
            result = original(self, *args, **kwargs)
        if _world_size() > 1:
            _agree(carried, parallel)
        return result

    return init_device


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def _agree(carried: Carried, parallel: Any) -> None:
    """Agree with the other hosts; one without a file takes the head's placement from then on."""
    import vllm

    settings, hosts = carried.settings, carried.settings.hosts
    assert hosts is not None, "asked by several hosts only"
    plan, placement = settings.plan, settings.placement
    said = {
        "engine": f"vLLM {vllm.__version__}",
        "strategy": settings.strategy,
        "digest": None if hosts.adopts else "" if plan is None else plan.digest,
        "source": "" if placement is None else placement.source,
        "error": hosts.error,
        "rules": {
            "--expert-placement-verify": settings.verification.level,
            "--enable-eplb": settings.rebalancing.moves,
            "--eplb-config.num_redundant_experts": 0 if placement is None else placement.redundant,
            "--expert-rebalance": settings.rebalancing.rules,
        },
    }
    parcel = {
        "plan": None if plan is None else pack(plan),
        "exact": placement is not None and placement.exact,
    }
    found = session.open_session(said, parcel, hosts.timeout, logger, partial(_name_rank, parallel))
    if hosts.adopts:
        assert found.parcel is not None, "the head always sends one"
        sent = found.parcel["plan"]
        adopted = settings.adopting(None if sent is None else unpack(sent), found.parcel["exact"])
        carried.put(adopted)
        STATE.settings = adopted
        plan = adopted.plan
    if plan is not None:
        session.warn_about_nodes(plan.metadata.get("node_of_rank"), real_topology(), logger)


def _name_rank(parallel: Any, rank: int) -> str:
    if parallel.nnodes > 1:
        return f"the host with --node-rank {rank // max(1, _world_size() // parallel.nnodes)} (rank {rank})"
    return f"the host of rank {rank}"


def check_adoption(settings: Settings) -> None:
    """Refuse to build a model before the head's placement has arrived.

    Raises:
        PlacementError: when it has not.
    """
    if settings.adopts:
        raise PlacementError(
            "the head's placement has not arrived in this process, which loads a model without "
            "having joined the other hosts: give this host the placement file too"
        )


def host_settings(
    parallel: Any, request: Request, adopts: bool, error: str | None
) -> HostSettings | None:
    """Say what workers must know about the other hosts; None on one host."""
    if not spans_hosts(parallel):
        return None
    timeout = DEFAULT_TIMEOUT
    if request.host_timeout is not None:
        timeout = check_timeout(request.host_timeout, options.HOST_TIMEOUT.flag)
    return HostSettings(timeout, parallel.nnodes, adopts, error)


def host_patches() -> list[Patch]:
    """The patch of a server whose ranks may lie on several hosts."""
    return [
        Patch(
            "hosts",
            "vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
            _init_device,
            why="each host reads the flags and files by itself, and nothing compares what they found; a host that is gone is waited for",
            upstream="vLLM issue 34297",
            removable_when="vLLM sends the head's config to all hosts and notices a host that vanishes",
        ),
    ]
