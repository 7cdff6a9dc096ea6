"""Keep what stays from one exchange under an engine to the next, on one rank.

Views of the weights, staging memory and connections are made once, so that a rebalance pays for its
transfers only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.events import count_event
from ..core.placement import EngineTable, Placement
from ..core.topology import Topology
from ..exchange.checkpoint import ExpertReader
from ..exchange.communication import Communication
from ..exchange.executor import Exchange, ExchangeReport
from ..exchange.expert_memory import padded_bytes, view_parameter
from ..exchange.peer_memory import PeerMemory
from ..exchange.plan import ExchangePlan, plan_exchange
from ..exchange.rank_stores import Stores
from ..exchange.staging import Memory
from ..exchange.watchdog import ForwardingWatchdog, Watchdog
from ..hosts.identity import host_key, number_hosts
from .policy import RebalancePolicy

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

STAGING_SHARE = 0.5
"""Staging memory when nothing else is asked for, as a share of a rank's slots in the largest layer.

The engines' own exchanges take all.
"""


@dataclass(frozen=True)
class RankFacts:
    """Hold what the EP ranks tell each other while all of them are alive.

    Attributes:
        topology: which ranks share a machine.
        stores: one per rank, where exchanges must go on after a death, be it of the rank with the
            default store; None where not.
        first: global rank of EP rank 0, which tells this group from others that share the default
            store.
    """

    topology: Topology
    stores: Stores | None
    first: int

    @classmethod
    def gather(cls, cpu_group: dist.ProcessGroup, outlive: bool = False) -> RankFacts:
        """Gather what all ranks say; a collective call.

        Args:
            cpu_group: of the EP ranks, for CPU tensors.
            outlive: whether ranks may die.
        """
        import torch.distributed as dist

        found: list[Any] = [None] * cpu_group.size()
        dist.all_gather_object(found, host_key(), group=cpu_group)
        topology = Topology(len(found), number_hosts(found))
        return cls(
            topology, Stores(cpu_group) if outlive else None, dist.get_global_rank(cpu_group, 0)
        )

    def store(self, live_ranks: Sequence[int]) -> dist.Store:
        """Return the store of an exchange between these ranks, the same on all of them."""
        from torch.distributed.distributed_c10d import _get_default_store

        return _get_default_store() if self.stores is None else self.stores.of(live_ranks[0])


@dataclass(frozen=True)
class ExchangeLimits:
    """Say what the exchanges of a server may take.

    Attributes:
        staging_bytes: bound on the memory that experts are received in; half of the slots of the
            largest layer when left out, and more where a layer takes it.
        timeout: seconds that a transfer or a vote may take.
        peer_memory: whether ranks of a host read experts in each other's memory where they can.
    """

    staging_bytes: int | None = None
    timeout: float = 60.0
    peer_memory: bool = True

    @classmethod
    def of(cls, policy: RebalancePolicy) -> ExchangeLimits:
        """Return what the user's rules allow."""
        return cls(policy.staging_bytes, max(60.0, 2 * policy.watchdog), policy.peer_memory)


def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Send a byte from every rank to every other, since the first transfer takes long by itself."""
    import torch
    import torch.distributed as dist

    ranks, rank = group.size(), group.rank()
    if device.type == "cpu" or ranks == 1:
        return
    out, into = (
        torch.zeros(1, dtype=torch.uint8, device=device),
        torch.zeros(ranks, dtype=torch.uint8, device=device),
    )
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    operations = []
    for step in range(1, ranks):
        to, source = (rank + step) % ranks, (rank - step) % ranks
        operations.append(dist.P2POp(dist.isend, out, dist.get_global_rank(group, to), group))
        operations.append(
            dist.P2POp(
                dist.irecv, into[source : source + 1], dist.get_global_rank(group, source), group
            )
        )
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    torch.get_device_module(device).synchronize()


class Exchanger:
    """Carries out the exchanges of one model on one rank.

    Args:
        weights: ``{layer: [tensor, ...]}``, tensors ``[slots, ...]``; engines keep them at one
            place in memory for as long as they serve.
        num_experts: logical experts of a layer.
        group: of all EP ranks, for the transfers.
        facts: of the same ranks.
        name: tells this model's exchanges from those of others that share the store.
        log: the engine's logger.
        limits: the defaults when left out.

    Raises:
        PlacementError: when the weights cannot be moved by slot.
    """

    def __init__(
        self,
        weights: Mapping[int, Sequence[torch.Tensor]],
        num_experts: int,
        group: dist.ProcessGroup,
        facts: RankFacts,
        name: str,
        log: logging.Logger,
        limits: ExchangeLimits | None = None,
    ):
        self.layer_ids = tuple(sorted(weights))
        self._parameters = {
            layer: [
                view_parameter(t, f"layer {layer}, tensor {k}")
                for k, t in enumerate(weights[layer])
            ]
            for layer in self.layer_ids
        }
        sizes = padded_bytes([self._parameters[layer] for layer in self.layer_ids])
        self.expert_bytes = dict(zip(self.layer_ids, sizes))
        """Of one expert of each layer, as staged: padding included."""
        first = next(p for parameters in self._parameters.values() for p in parameters)
        self.num_experts, self.num_slots = num_experts, first.rows.shape[0]
        self.device = first.rows.device
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.topology, self._facts = facts.topology, facts
        self.log = log
        self._limits = ExchangeLimits() if limits is None else limits
        self._share = int(STAGING_SHARE * self.num_slots * max(sizes))
        self._memory = Memory(double=self._limits.staging_bytes is None)
        # Keys of the last two exchanges: a slow rank may still be reading how the last one ended.
        self._ended: list[Callable[[], None]] = []
        self._epoch = 0
        self._peers: PeerMemory | None = None
        self._prefix = f"{name}/{facts.first}"
        self.last: ExchangeReport | None = None

    def look_at_peers(self, cpu_group: dist.ProcessGroup) -> PeerMemory:
        """See which ranks' experts this one can read where they lie, and let all know.

        A collective call, in which nobody may be dead.

        Args:
            cpu_group: of the EP ranks, for CPU tensors.
        """
        self._peers = PeerMemory.of(self._parameters, self.topology, cpu_group, self.log)
        self.log.info("moe_placement_plugin: %s", self._peers)
        return self._peers

    def reserve(self) -> None:
        """Take the staging memory now, before the engine gives the rest of the device's away."""
        import torch

        bound = self._limits.staging_bytes
        bound = self._share if bound is None else min(bound, 2 * self._share)
        sends = (
            self._peers is None or not (self._peers.reads | np.eye(self.ranks, dtype=bool)).all()
        )
        packed = 0
        if sends:
            largest = max(self.expert_bytes.values())
            packed = replace(self._memory, staging_bytes=bound).packing_bytes(largest)
        self._memory.kept = torch.empty(bound + packed, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        """Give the staging memory back until the next exchange."""
        self._memory.kept = None

    def plan(
        self,
        old: np.ndarray,
        new: np.ndarray,
        layer_ids: Sequence[int],
        live_ranks: Sequence[int] | None = None,
        weighed: ExchangePlan | None = None,
    ) -> ExchangePlan:
        """Return what has to move.

        Args:
            old, new: int ``[layers, physical experts]`` of some or all layers, as the engine asks
                for them.
            layer_ids: of their rows.
            live_ranks: ranks that take part; all when left out.
            weighed: the exchange that a rebalance was decided by. What of it leads from ``old`` to
                ``new`` is carried out; where it leads elsewhere, the exchange is planned anew.
        """
        rows = np.flatnonzero((old != new).any(axis=1)).tolist()
        of_these = weighed is not None and weighed.new.layer_ids == tuple(layer_ids)
        # Layers that stay are left out, but where most of them change a weighed exchange is taken
        # as it is: to cut it costs more than to look at the others.
        if rows and not (of_these and 2 * len(rows) >= len(old)):
            old, new, layer_ids = old[rows], new[rows], [layer_ids[row] for row in rows]
        sizes = [self.expert_bytes[layer] for layer in layer_ids]
        if weighed is not None and self._is_of_this_model(weighed):
            part = weighed.part(old, new, layer_ids, live_ranks, sizes)
            if part is not None:
                return part
        before, after = (self._placement(table, layer_ids) for table in (old, new))
        return plan_exchange(before, after, self.topology, live_ranks, sizes)

    def _is_of_this_model(self, plan: ExchangePlan) -> bool:
        """Whether a plan is between tables of this model's experts and ranks."""
        slots = (self.num_slots,) * self.ranks
        return plan.topology == self.topology and all(
            p.num_logical_experts == self.num_experts and p.slots_per_rank == slots
            for p in (plan.old, plan.new)
        )

    def _placement(self, table: np.ndarray, layer_ids: Sequence[int]) -> Placement:
        """Return a table as a placement, in which a rank may hold an expert twice."""
        slots = (self.num_slots,) * self.ranks
        return EngineTable(np.asarray(table), self.num_experts, slots, tuple(layer_ids))

    def exchange(
        self,
        plan: ExchangePlan,
        on_commit: Callable[[tuple[int, ...]], None] | None = None,
        reader: ExpertReader | None = None,
        watchdog: Watchdog | None = None,
    ) -> ExchangeReport:
        """Carry a plan out, the server waiting.

        Args:
            plan: the same on all live ranks, of some or all layers.
            on_commit: as `Exchange.run` takes it.
            reader: for experts that no live rank holds.
            watchdog: is told what is waited for.

        Raises:
            ExchangeAborted, ExchangeLost: as `Exchange.run`.
        """
        from torch.distributed import PrefixStore

        self._epoch += 1
        bound = self._limits.staging_bytes
        # A rebalance that takes more is declined before it comes here; the first move and the loss
        # of a rank must go through.
        bound = max(self._share if bound is None else bound, plan.min_staging_bytes)
        memory = replace(self._memory, staging_bytes=bound)
        found = Exchange(
            plan,
            self._parameters,
            Communication(
                self._epoch,
                self.group,
                PrefixStore(self._prefix, self._facts.store(plan.live_ranks)),
                self._limits.timeout,
            ),
            memory,
            reader,
            None if watchdog is None else ForwardingWatchdog(watchdog),
            self._peers,
        )
        self.last = report = found.run(
            on_commit, self._ended.pop(0) if len(self._ended) > 1 else None
        )
        self._memory.kept = memory.kept
        self._ended.append(found.forget)
        count_event("exchanges")
        count_event("exchange_seconds", report.seconds)
        self.log.info(
            "moe_placement_plugin: exchanged experts of %d layers in %.4f s (%d chunks of at most "
            "%.4f s): %.1f MB in, %.1f MB out, %.1f MB read, %.1f MB of staging memory",
            len(plan.changed_rows),
            report.seconds,
            report.chunks,
            report.longest,
            report.bytes_received / 1e6,
            report.bytes_sent / 1e6,
            report.bytes_read / 1e6,
            report.staging_bytes / 1e6,
        )
        return report


def is_whole(table: np.ndarray) -> bool:
    """Whether every slot of an engine's table holds an expert: some are -1 while ranks change."""
    return bool((np.asarray(table) >= 0).all())
