"""What the processes of the tests do.

Hold weights whose bytes name their expert, carry out an exchange, say what they hold then.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.exchange import peer_reads
from moe_placement_plugin.exchange.commit import Agreement, ExchangeAborted, ExchangeLost
from moe_placement_plugin.exchange.communication import Communication
from moe_placement_plugin.exchange.device_queue import DeviceQueue
from moe_placement_plugin.exchange.executor import Exchange
from moe_placement_plugin.exchange.expert_memory import view_parameter
from moe_placement_plugin.exchange.peer_memory import PeerMemory
from moe_placement_plugin.exchange.plan import ExchangePlan, plan_exchange
from moe_placement_plugin.exchange.staging import Memory
from moe_placement_plugin.exchange.watchdog import Watchdog
from moe_placement_plugin.rebalancing.lost_experts import place_lost

from .cases import expert_content
from .keepers import LATE
from .pieces import Pieces

SHAPES = (
    ((5, 3), torch.float32),
    ((7,), torch.uint8),
    ((2, 4), torch.bfloat16),
    ((1,), torch.float8_e4m3fn),
)
"""One slot of each tensor of a layer.

Their bytes are random, so NaNs of all kinds are among them.
"""


def expert_tensor(row: int, expert: int, parameter: int) -> torch.Tensor:
    shape, dtype = SHAPES[parameter]
    size = int(np.prod(shape)) * dtype.itemsize
    content = expert_content(row, expert, parameter, size - parameter)
    return torch.from_numpy(content.copy()).view(dtype).reshape(shape)


def weights_of(placement, rank: int, slots: int) -> list[list[torch.Tensor]]:
    """This rank's tensors of each layer; the first in a transposed layout, spare slots zero."""
    result = []
    for row in range(placement.num_layers):
        tensors = []
        for parameter, (shape, dtype) in enumerate(SHAPES):
            tensor = (
                torch.zeros((slots, *shape[::-1]), dtype=dtype).transpose(1, 2)
                if parameter == 0
                else torch.zeros((slots, *shape), dtype=dtype)
            )
            for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
                tensor[slot] = expert_tensor(row, expert, parameter)
            tensors.append(tensor)
        result.append(tensors)
    return result


def shared(weights: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The same in memory that other processes can map, as a GPU's.

    Other memory of this process they can attach to.
    """
    torch.multiprocessing.set_sharing_strategy("file_system")
    for tensors in weights:
        for tensor in tensors:
            tensor.share_memory_()
    return weights


def peer_memory(weights: list[list[torch.Tensor]], nodes: tuple[int, ...]) -> PeerMemory:
    """Ranks on these nodes, all of them members of the default group."""
    own = {layer: [view_parameter(t, "") for t in tensors] for layer, tensors in enumerate(weights)}
    return PeerMemory.of(own, Topology(len(nodes), nodes), dist.group.WORLD, logging.getLogger())


def as_bytes(weights: list[list[torch.Tensor]]) -> list[list[np.ndarray]]:
    return [
        [t.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy() for t in tensors]
        for tensors in weights
    ]


class Reader:
    """Makes experts up as the checkpoint would hold them, and notes which were asked for."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def read(self, layer, expert, out) -> int:
        self.asked.append((layer, expert))
        for parameter, tensor in enumerate(out):
            tensor.copy_(expert_tensor(layer, expert, parameter))
        return sum(t.nbytes for t in out)


def together(store, name: str, count: int) -> None:
    """Go on when as many ranks have come here.

    The store is the parent's: no rank that ends takes it along.
    """
    if store.add(name, 1) == count:
        store.set(f"all {name}", "")
    store.wait([f"all {name}"], timedelta(seconds=30))


def survivors(found: Exchange, store, expected: int) -> tuple[int, ...]:
    """`Exchange.survivors` of as many ranks, however late one of them comes.

    Nobody waits for the dead.
    """
    if store.add("noticed", 1) < expected:
        return found.survivors(30)
    while len(found._agreement._ask(found._agreement._alive.present)) < expected - 1:
        time.sleep(0.001)
    return found.survivors(0.0)


def exchange(
    rank: int,
    world: int,
    store,
    plan: ExchangePlan,
    limits: dict,
    by_layer: bool = False,
    nodes: tuple[int, ...] | None = None,
    attached: bool = False,
):
    """Carry the plan out; (bytes of all weights, what was read from the checkpoint, report).

    Args:
        limits: of `Memory`; ``free``: memory that a GPU would have free; ``singly``:
            `peer_reads.READ_SINGLY`.
        nodes: of the ranks, when those of a node are to read each other's memory.
        attached: in which they do not map it.
    """
    slots = max(plan.old.slots_per_rank[rank], plan.new.slots_per_rank[rank])
    weights = weights_of(plan.old, rank, slots)
    reader = Reader()
    peers = None
    if nodes is not None:
        peers = peer_memory(weights if attached else shared(weights), nodes)
    limits = dict(limits)
    peer_reads.READ_SINGLY = limits.pop("singly", peer_reads.READ_SINGLY)
    if "free" in limits:
        free = limits.pop("free")
        DeviceQueue.free_memory = lambda self: free
    alive = rank in plan.live_ranks
    group = dist.new_group(list(plan.live_ranks)) if len(plan.live_ranks) < world else None
    if not alive:
        return None
    given = dict(zip(plan.new.layer_ids, weights)) if by_layer else weights
    how = Communication(1, group, store, timeout=20)
    found = Exchange(plan, given, how, Memory(**limits), reader, peers=peers)
    report = found.run()
    assert found.metadata.complete
    return as_bytes(weights), reader.asked, report


def exchange_with_a_death(
    rank: int,
    world: int,
    store,
    plan: ExchangePlan,
    victim: int,
    moment: float | None,
    limits: dict,
    nodes: tuple[int, ...] | None = None,
    attached: bool = False,
):
    """Carry the plan out while ``victim`` dies at ``moment``.

    The share of its pieces of work done by then (None: somebody else kills it).

    The same exchange goes before, undisturbed. It tells how much work there is and how long it
    takes, which the store then says as ``microseconds``: a death after the end would prove nothing.
    The survivors have that much more time to notice, since it tells as well how busy the machine
    is.

    Returns:
        (bytes of all weights, committed layers, survivors (None when nothing was noticed, empty for
        a rank that came too late to be one), reason); no weights and no layers where the rank has
        to load its weights anew.
    """
    work = Pieces()

    def prepared(epoch: int, timeout: float) -> tuple[list[list[torch.Tensor]], Exchange]:
        weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
        peers = None
        if nodes is not None:
            peers = peer_memory(weights if attached else shared(weights), nodes)
        how = Communication(epoch, store=store, timeout=timeout)
        return weights, Exchange(plan, weights, how, Memory(**limits), Reader(), peers=peers)

    _, calm = prepared(1, 30.0)
    dist.barrier()
    began = time.perf_counter()
    work.count(calm.run)
    took = time.perf_counter() - began
    weights, found = prepared(2, 2.0 + 5 * took)
    dist.barrier()
    if rank == victim:
        store.add("microseconds", round(took * 1e6))
        if moment is not None:
            work.at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
    store.add("ready", 1)
    try:
        found.run()
    except ExchangeAborted as aborted:
        # The others are known only after their time to notice. On a busy machine one may come too
        # late: it stops then, and is told why.
        try:
            live, reason = found.survivors(0.5 + 5 * took), aborted.reason
        except ExchangeLost as lost:
            live, reason = (), str(lost)
        return as_bytes(weights), aborted.metadata.committed, live, reason
    except ExchangeLost as lost:
        return None, None, (), str(lost)
    return as_bytes(weights), found.metadata.committed, None, ""


def start(store, plan: ExchangePlan, weights, reader=None, watchdog=None, **how) -> Exchange:
    """An exchange of a layer a chunk; ``how``: other fields of `Communication`."""
    return Exchange(
        plan,
        weights,
        Communication(**({"epoch": 1, "store": store, "timeout": 10.0} | how)),
        Memory(max_layers=1),
        Reader() if reader is None else reader,
        watchdog,
    )


def outcome(found: Exchange, weights):
    """(bytes of all weights, committed layers, reason) of an exchange that may be aborted."""
    try:
        found.run()
    except ExchangeAborted as aborted:
        return as_bytes(weights), aborted.metadata.committed, aborted.reason
    return as_bytes(weights), found.metadata.committed, ""


def with_another_plan(rank: int, world: int, store, plan: ExchangePlan, other: ExchangePlan):
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    return outcome(start(store, other if rank == 1 else plan, weights), weights)


class FailingReader(Reader):
    def read(self, layer, expert, out) -> int:
        if layer == 1:
            raise OSError(f"disk is gone, layer {layer}")
        return super().read(layer, expert, out)


def with_a_failing_reader(rank: int, world: int, store, plan: ExchangePlan):
    group = dist.new_group(list(plan.live_ranks))
    if rank not in plan.live_ranks:
        return None
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    return outcome(start(store, plan, weights, group=group, reader=FailingReader()), weights)


def twice_with_one_epoch(rank: int, world: int, store, plan: ExchangePlan, back: ExchangePlan):
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    start(store, plan, weights).run()
    try:
        start(store, back, weights).run()
    except PlacementError as error:
        refused = str(error)
    start(store, back, weights, epoch=2).run()
    return as_bytes(weights), refused


def with_a_rank_that_hangs(rank: int, world: int, store, plan: ExchangePlan, hangs: int):
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    said: list[str] = []
    watchdog = Watchdog(0.3, 1.2, report=said.append)
    found = start(store, plan, weights, watchdog=watchdog, timeout=40)
    if rank == hangs:
        together(store, "gave up", world)
    began = time.monotonic()
    result = outcome(found, weights)
    took = time.monotonic() - began
    if rank != hangs:
        together(store, "gave up", world)
    return *result, said, took


def after_the_store_is_gone(rank: int, world: int, store, plan: ExchangePlan):
    """Rank 0 holds the store of the agreement, and dies when the first chunk is committed."""
    if rank == 0:
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
    else:
        own = dist.TCPStore(
            "127.0.0.1", int(store.get("port")), is_master=False, wait_for_workers=False
        )
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    try:
        for _ in start(own, plan, weights).steps():
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    except ExchangeLost as error:
        return str(error)
    return "not noticed"


def with_a_late_reader(rank: int, world: int, store, plan: ExchangePlan):
    """Rank 0 holds the store of the agreement, votes last and ends as soon as its exchange has.

    The others read the fates late.
    """
    if rank == 0:
        own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(own.port))
        vote = Agreement.vote

        def vote_last(self, chunk: int, *args, **more) -> str | None:
            while self.missing(chunk) != [0]:
                time.sleep(0.001)
            return vote(self, chunk, *args, **more)

        Agreement.vote = vote_last
    else:
        own = dist.TCPStore(
            "127.0.0.1", int(store.get("port")), is_master=False, wait_for_workers=False
        )
        read = Agreement._await_fate

        def read_late(self, store, chunk: int) -> str | None:
            time.sleep(LATE)
            return read(self, store, chunk)

        Agreement._await_fate = read_late
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    try:
        Exchange(plan, weights, Communication(1, store=own, timeout=10)).run()
    except ExchangeLost as lost:
        return str(lost)
    return as_bytes(weights)


def recovering(rank: int, world: int, store, plan: ExchangePlan, victim: int):
    """A death after the second chunk.

    The survivors go on by themselves, to a placement without the dead rank.
    """
    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    found = start(store, plan, weights)
    try:
        for number, _ in enumerate(found.steps()):
            if rank == victim and number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except ExchangeAborted as aborted:
        live = survivors(found, store, world - 1)
        in_force = aborted.metadata.in_force()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("again", store), rank=live.index(rank), world_size=len(live)
    )
    reader = Reader()
    after = plan_exchange(in_force, place_lost(in_force, live), live_ranks=live)
    start(store, after, weights, epoch=2, reader=reader).run()
    return as_bytes(weights), in_force, live, reader.asked


def by_an_exchanger(rank: int, world: int, store, placements, dies: int | None):
    """Exchanges one after the other as an engine has them; ``dies`` leaves after the second.

    Returns:
        (bytes of all weights, keys of agreements in the store, staging buffers).
    """
    import logging

    from moe_placement_plugin.rebalancing.exchanger import (
        ExchangeLimits,
        Exchanger,
        RankFacts,
    )

    weights = weights_of(placements[0], rank, placements[0].slots_per_rank[rank])
    facts = RankFacts.gather(dist.group.WORLD, outlive=dies is not None)
    exchanger = Exchanger(
        dict(enumerate(weights)),
        placements[0].num_logical_experts,
        dist.group.WORLD,
        facts,
        "test",
        logging.getLogger(),
        ExchangeLimits(timeout=20),
    )
    exchanger.reserve()
    live = None
    staging = set()
    before = store.num_keys()
    for number, (old, new) in enumerate(zip(placements, placements[1:])):
        if number == 2 and dies is not None:
            # Between two exchanges: who still asks the store of a rank that dies stops, which is
            # tested elsewhere.
            together(store, "two", world)
            if rank == dies:
                os._exit(0)
            live = [r for r in range(world) if r != dies]
        committed: list[int] = []
        tables = (p.physical_to_logical for p in (old, new))
        plan = exchanger.plan(*tables, range(old.num_layers), live)
        exchanger.exchange(plan, lambda rows, committed=committed: committed.extend(rows), Reader())
        assert committed == plan.changed_rows.tolist()
        staging.add(exchanger._memory.kept.data_ptr())
    return as_bytes(weights), store.num_keys() - before, len(staging)
