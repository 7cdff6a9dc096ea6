"""Experts read in the memory of other ranks.

Real processes whose weights lie in shared memory, as GPUs' do under CUDA's handles, or in their
own.
"""

from __future__ import annotations

import inspect
import mmap
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_placement_plugin import Topology
from moe_placement_plugin.exchange.cross_memory import Process
from moe_placement_plugin.exchange.plan import plan_exchange

from .cases import drifted, random_placement
from .test_executor import check_weights


def placements(seed: int, slots, experts: int = 12):
    rng = np.random.default_rng(seed)
    return random_placement(rng, 4, experts, slots), random_placement(rng, 4, experts, slots)


@pytest.fixture(scope="module")
def sent(ranks):
    """What each rank has when all experts are sent, by plan and limits.

    The same for each way of reading.
    """
    from .ranks import exchange

    found: dict = {}

    def run(plan, limits: dict):
        key = plan.digest, plan.topology, tuple(limits.items())
        if key not in found:
            found[key] = ranks.run(exchange, 4, plan, limits)
        return found[key]

    return run


@pytest.mark.parametrize(
    "nodes",
    [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 2)],
    ids=["one node", "two nodes", "a rank alone"],
)
@pytest.mark.parametrize("cut", ["whole", "singly", "by layer", "staging", "double"])
@pytest.mark.parametrize("attached", [False, True], ids=["mapped", "attached"])
def test_read_and_sent_end_alike(ranks, sent, nodes, cut, attached):
    from .ranks import SHAPES, exchange

    plan = plan_exchange(*placements(1, [5, 4, 6, 5]), Topology(4, nodes))
    need = int(plan.staging_needed([64 * len(SHAPES)] * 4).max())
    double = {"staging_bytes": need, "double": True, "free": 4 * need}
    limits = {
        "whole": {},
        "singly": {"singly": 20},
        "by layer": {"max_layers": 1},
        "staging": {"staging_bytes": need},
        "double": double,
    }[cut]
    read = ranks.run(exchange, 4, plan, limits, False, nodes, attached)
    for rank, (a, b) in enumerate(zip(read, sent(plan, limits))):
        check_weights(a[0], plan.new, rank)
        assert all((x == y).all() for p, q in zip(a[0], b[0]) for x, y in zip(p, q))
        assert (a[2].bytes_received, a[2].bytes_sent, a[2].chunks) == (
            b[2].bytes_received,
            b[2].bytes_sent,
            b[2].chunks,
        )
        assert a[2].packing_bytes <= b[2].packing_bytes
    doubled = [result[2].staging_bytes > need for result in read]
    assert any(doubled) == (
        cut in ("whole", "singly", "by layer") or cut == "double" and nodes == (0, 0, 0, 0)
    )
    packed = [result[2].packing_bytes for result in read]
    node_of = np.array(nodes)
    between = node_of[plan.transfers.from_rank] != node_of[plan.transfers.to_rank]
    assert [size > 0 for size in packed] == [
        bool((plan.transfers.from_rank[between] == rank).any()) for rank in range(4)
    ]


def repeatedly(rank, world, store, plan, back, number, attached):
    """There and back again, rank 1 slow to overwrite its slots.

    Whether all bytes are right each time.
    """
    from moe_placement_plugin.exchange import transfers
    from moe_placement_plugin.exchange.communication import Communication
    from moe_placement_plugin.exchange.executor import Exchange

    from .ranks import as_bytes, peer_memory, shared, weights_of

    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    peers = peer_memory(weights if attached else shared(weights), (0,) * world)
    if rank == 1:
        copy_rows = transfers.copy_rows
        transfers.copy_rows = lambda *rows: (time.sleep(0.02), copy_rows(*rows))
    for turn in range(number):
        going = plan if turn % 2 == 0 else back
        how = Communication(turn, store=store, timeout=20)
        Exchange(going, weights, how, peers=peers).run()
        check_weights(as_bytes(weights), going.new, rank)
    return True


@pytest.mark.parametrize("attached", [False, True], ids=["mapped", "attached"])
def test_nobody_reads_what_is_being_overwritten(ranks, attached):
    """The fault: a rank that has ended an exchange reads on while a slow one has yet to overwrite.

    In the next exchange, if nothing held it.
    """
    old, new = placements(2, [6, 6, 6])
    assert (
        ranks.run(repeatedly, 3, plan_exchange(old, new), plan_exchange(new, old), 6, attached)
        == [True] * 3
    )


def without_a_rank(rank, world, store, plan, dead, attached):
    """Rank ``dead`` leaves before the exchange."""
    from moe_placement_plugin.exchange.communication import Communication
    from moe_placement_plugin.exchange.executor import Exchange

    from .ranks import Reader, as_bytes, peer_memory, shared, together, weights_of

    weights = weights_of(plan.old, rank, plan.old.slots_per_rank[rank])
    peers = peer_memory(weights if attached else shared(weights), (0,) * world)
    together(store, "looked", world)  # memory goes with its owner
    if rank == dead:
        return None
    how = Communication(1, store=store, timeout=20)
    report = Exchange(plan, weights, how, reader=Reader(), peers=peers).run()
    check_weights(as_bytes(weights), plan.new, rank)
    return report.bytes_sent


@pytest.mark.parametrize("attached", [False, True], ids=["mapped", "attached"])
def test_the_others_go_on_without_a_dead_rank(ranks, attached):
    """No message passes, so the group that the dead rank is a member of is of no matter."""
    rng = np.random.default_rng(4)
    live = [0, 1, 3]
    old, new = random_placement(rng, 3, 8, [6] * 4), random_placement(rng, 3, 8, [6] * 4, live)
    results = ranks.run(without_a_rank, 4, plan_exchange(old, new, live_ranks=live), 2, attached)
    assert (
        results[2] is None and sum(result for rank, result in enumerate(results) if rank != 2) > 0
    )


def refuse(self, pieces):
    raise PermissionError(1, "Operation not permitted")


def looks(rank, world, store, what, attached):
    """What ranks see of each other, and their first bytes through each other's eyes."""
    import torch

    from moe_placement_plugin.exchange import peer_memory as peers

    from .ranks import as_bytes, peer_memory, shared, weights_of

    placement = random_placement(np.random.default_rng(0), 2, 6, [3] * world)
    weights = weights_of(placement, rank, 3)
    if not (what == "one attached" and rank == 1 or attached):
        weights = shared(weights)
    if rank == 1:
        offered = peers._beginning
        if what == "wrong":
            peers._beginning = lambda rows: bytes(len(offered(rows)))
        if what == "another process":
            peers.Process.own = lambda: peers.Process(os.getppid(), id(what), bytes(16))
        if what == "no longer there":
            peers.Process.own = lambda: peers.Process(2**22 - 1, id(what), bytes(16))
        if what == "not allowed":
            peers.Process.read = refuse
    pointers = [t.data_ptr() for tensors in weights for t in tensors]
    found = peer_memory(weights, (0,) * world)
    assert pointers == [t.data_ptr() for tensors in weights for t in tensors], (
        "an engine would go on with other memory"
    )
    torch.distributed.barrier()
    seen = {
        peer: [contents(p) for tensors in layers.values() for p in tensors]
        for peer, layers in found.parameters.items()
    }
    torch.distributed.barrier()  # memory goes with its owner
    return found.reads, seen, str(found), as_bytes(weights)


def contents(parameter):
    """Bytes ``[slots, bytes of one expert]`` that a rank sees."""
    from moe_placement_plugin.exchange.cross_memory import AttachedRows

    if not isinstance(parameter, AttachedRows):
        return parameter.rows.clone().numpy()
    found = np.zeros((3, parameter.bytes), np.uint8)
    parameter.process.read(
        [(found[slot].ctypes.data, parameter.row(slot), parameter.bytes) for slot in range(3)]
    )
    return found


@pytest.mark.parametrize(
    "what, attached",
    [
        ("all", False),
        ("one attached", False),
        ("wrong", False),
        ("all", True),
        ("wrong", True),
        ("another process", True),
        ("no longer there", True),
        ("not allowed", True),
    ],
)
def test_what_cannot_be_seen_is_left_to_messages(ranks, what, attached):
    """Memory that does not hold what its owner says, or that the system does not let be read."""
    results = ranks.run(looks, 3, what, attached)
    expected = ~np.eye(3, dtype=bool)
    if what in (
        "wrong",
        "another process",
        "no longer there",
    ):  # what rank 1 says of its own does not hold
        expected[:, 1] = False
    if (
        what == "not allowed" or what == "wrong" and not attached
    ):  # and it sees nothing of the others'
        expected[1, :] = False
    for reads, _, text, _ in results:
        assert (
            reads == expected
        ).all() and text == f"{expected.sum()} of 6 pairs of ranks read each other's memory"
    for reader in range(3):
        seen = results[reader][1]
        assert sorted(seen) == np.flatnonzero(expected[reader]).tolist()
        for peer, parameters in seen.items():
            held = [tensor.reshape(3, -1) for tensors in results[peer][3] for tensor in tensors]
            assert [a.shape for a in parameters] == [b.shape for b in held]
            # The first tensor is transposed in memory; the others lie as they are.
            assert all((a == b).all() for k, (a, b) in enumerate(zip(parameters, held)) if k % 4)


def drops_out(rank, world, store, plan):
    """Rank 1 never enters."""
    from moe_placement_plugin.exchange.commit import ExchangeAborted
    from moe_placement_plugin.exchange.communication import Communication
    from moe_placement_plugin.exchange.executor import Exchange

    from .ranks import as_bytes, peer_memory, shared, together, weights_of

    weights = shared(weights_of(plan.old, rank, plan.old.slots_per_rank[rank]))
    how = Communication(1, store=store, timeout=0.5)
    found = Exchange(plan, weights, how, peers=peer_memory(weights, (0,) * world))
    together(store, "looked", world)  # memory goes with its owner
    if rank == 1:
        return None
    with pytest.raises(ExchangeAborted) as caught:
        found.run()
    check_weights(as_bytes(weights), plan.old, rank)
    return str(caught.value)


def test_reading_begins_when_all_have_come(ranks):
    old, _ = placements(3, [6, 6, 6])
    plan = plan_exchange(old, drifted(np.random.default_rng(3), old, share=0.5))
    results = ranks.run(drops_out, 3, plan)
    # On a busy machine one of the two may have come late as well, for the other one's patience.
    assert results[0] == results[2]
    assert re.search(r"waited 0\.5 s for ranks \[(0, )?1(, 2)?\]", results[0]), results


def test_torch_names_what_is_changed_of_a_cuda_tensor():
    """A CUDA tensor is seen from the reader's device.

    What says so must be known by these names in the installed torch.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    assert {"storage_device", "event_sync_required"} <= set(
        inspect.signature(rebuild_cuda_tensor).parameters
    )


def test_memory_of_another_process_in_many_pieces_and_its_end():
    """More pieces than the system takes at once, and what ends before all of it is read."""
    child = subprocess.Popen(
        [sys.executable, "-c", OTHER], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    try:
        at = int(child.stdout.readline())
        other = Process(child.pid, at, bytes(range(16)))
        other.check()
        with pytest.raises(OSError, match="another one"):
            Process(child.pid, at + 1, bytes(range(16))).check()
        found = np.zeros(3000, np.uint8)
        other.read([(found[i:].ctypes.data, at + i, 1) for i in range(2999, -1, -1)])
        assert (found == np.arange(3000) % 256).all()
        end = at + 3 * mmap.PAGESIZE
        with pytest.raises(OSError, match="ends within|cannot be read"):
            other.read([(found.ctypes.data, end - 8, 16)])
    finally:
        child.kill()
        child.wait()
    with pytest.raises(
        ProcessLookupError, match=f"memory of process {child.pid} cannot be read: No such process"
    ):
        other.read([(found.ctypes.data, at, 1)])


OTHER = """
import ctypes, mmap
memory = mmap.mmap(-1, 4 * mmap.PAGESIZE)
memory[: 3 * mmap.PAGESIZE] = bytes(i % 256 for i in range(3 * mmap.PAGESIZE))
at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + 3 * mmap.PAGESIZE), mmap.PAGESIZE, 0)
print(at, flush=True)
input()
"""
