"""The plan as a pure function.

Carried out on numpy arrays, it gives every slot its expert, within its own promises.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moe_placement_plugin.core.diff import compare
from moe_placement_plugin.core.errors import PlacementError
from moe_placement_plugin.core.placement import EngineTable, Placement
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.exchange.plan import plan_exchange
from moe_placement_plugin.exchange.transfer_table import TransferTable

from .cases import SimulatedRanks, exchanges, random_placement

RUNS = settings(max_examples=60, deadline=None)


def simulated(plan) -> SimulatedRanks:
    capacity = np.maximum(plan.old.slots_per_rank, plan.new.slots_per_rank).tolist()
    return SimulatedRanks.holding(plan.old, capacity, dead=np.flatnonzero(~plan.live))


@RUNS
@given(exchanges(), st.integers(1, 3), st.booleans())
def test_every_slot_gets_its_expert_however_the_plan_is_cut(plan, max_layers, tight):
    whole, cut = simulated(plan), simulated(plan)
    before = simulated(plan)
    whole.carry_out(plan, plan.chunks())
    bound = max(plan.min_staging_bytes, 1) if tight else None
    chunks = plan.chunks(bound, max_layers)
    cut.carry_out(plan, chunks)
    whole.check(plan.new, plan.live_ranks)
    for rank in range(plan.new.num_ranks):
        for row in range(plan.new.num_layers):
            for a, b, c in zip(
                whole.weights[rank][row], cut.weights[rank][row], before.weights[rank][row]
            ):
                assert (a == b).all()
                if not plan.live[rank]:
                    assert (a == c).all()
    assert [row for chunk in chunks for row in chunk.rows] == plan.changed_rows.tolist()
    for chunk in chunks:
        assert len(chunk.rows) <= max_layers
        assert bound is None or chunk.staging_bytes.max() <= bound


@RUNS
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 6))
def test_an_engines_table_may_hold_an_expert_twice_on_a_rank(seed, ranks, slots):
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, ranks * slots + 1))

    def table() -> EngineTable:
        rows = [
            rng.permutation(
                np.concatenate(
                    [np.arange(experts), rng.integers(experts, size=ranks * slots - experts)]
                )
            )
            for _ in range(3)
        ]
        return EngineTable(np.array(rows), experts, (slots,) * ranks)

    plan = plan_exchange(table(), table())
    ran = simulated(plan)
    ran.carry_out(plan, plan.chunks(max_layers=1))
    ran.check(plan.new, plan.live_ranks)
    half = plan.metadata()
    half.committed[1] = True
    assert (
        half.in_force().physical_to_logical[1].tolist() == plan.new.physical_to_logical[1].tolist()
    )


@RUNS
@given(exchanges())
def test_rounds_have_no_contention_and_are_as_few_as_can_be(plan):
    for chunk in plan.chunks(max_layers=2):
        busiest = 0
        for ranks in (chunk.transfers.from_rank, chunk.transfers.to_rank):
            for part in range(chunk.num_rounds):
                peers = ranks[chunk.round_of == part]
                assert np.unique(peers).size == peers.size
            busiest = max(busiest, np.bincount(ranks, minlength=1).max())
        assert chunk.num_rounds == busiest
        assert (np.diff(chunk.round_of) >= 0).all()


@RUNS
@given(exchanges())
def test_sources(plan):
    """Live experts come from live ranks, from the receiver's node where it has one.

    No holder sends two more than another could.
    """
    node = plan.topology.node_of_rank
    held = [
        [set(plan.old.local_experts(row, r).tolist()) for r in range(plan.old.num_ranks)]
        for row in range(plan.old.num_layers)
    ]
    for row in range(plan.new.num_layers):
        of_layer = plan.transfers.within(row, row)
        sends = np.bincount(of_layer.from_rank, minlength=plan.new.num_ranks)
        for _, expert, source, slot, rank, _to in of_layer:
            assert plan.old.local_experts(row, source)[slot] == expert
            assert expert not in held[row][rank]
            holders = [r for r in plan.live_ranks if expert in held[row][r]]
            near = [r for r in holders if node[r] == node[rank]]
            if near:
                assert source in near
            assert sends[source] <= min(sends[r] for r in (near or holders)) + 1
        for _, expert, rank, _to in plan.reads.within(row, row):
            assert not any(expert in held[row][r] for r in plan.live_ranks)
            assert plan.live[rank]


@settings(RUNS, suppress_health_check=[HealthCheck.filter_too_much])
@given(exchanges(), st.integers(0, 2**32 - 1))
def test_an_exchange_can_be_undone(plan, seed):
    assume(plan.old.slots_per_rank == plan.new.slots_per_rank and plan.live.all())
    ranks = simulated(plan)
    done = plan.metadata()
    for chunk in plan.chunks(max_layers=1)[
        : int(np.random.default_rng(seed).integers(0, plan.new.num_layers + 1))
    ]:
        ranks.carry_out(plan, (chunk,))
        done.committed[list(chunk.rows)] = True
    ranks.check(done.in_force(), plan.live_ranks)
    back = plan_exchange(done.in_force(), done.old, plan.topology)
    ranks.carry_out(back, back.chunks())
    ranks.check(plan.old, plan.live_ranks)


@RUNS
@given(exchanges())
def test_counts_agree_with_diff(plan):
    if plan.live.all():
        assert (plan.incoming == compare(plan.old, plan.new).received).all()
        assert not len(plan.reads)


@RUNS
@given(exchanges())
def test_every_rank_computes_the_same(plan):
    again = plan_exchange(plan.old, plan.new, plan.topology, plan.live_ranks, plan.expert_bytes)
    assert again.digest == plan.digest
    for name in ("transfers", "reads", "copies"):
        assert (getattr(again, name).array == getattr(plan, name).array).all()


def test_a_live_replica_wins_over_the_checkpoint():
    """The chosen source of SGLang's updater may be dead while another holder lives.

    Here the live one sends.
    """
    old = Placement(np.array([[0, 1, 2, 0, 1, 3, 2, 3]]), 4, (2, 2, 2, 2))
    new = Placement(np.array([[0, 1, 2, 0, 1, 3, 0, 2]]), 4, (2, 2, 2, 2))
    plan = plan_exchange(old, new, live_ranks=[1, 2, 3])
    assert not len(plan.reads)
    assert list(plan.transfers) == [(0, 0, 1, 1, 3, 0)]
    assert list(plan.copies) == [(0, 3, 0, 1)]
    lost = plan_exchange(
        old, Placement(np.array([[0, 1, 2, 0, 1, 3, 2, 3]]), 4, (2, 2, 2, 2)), live_ranks=[1, 2, 3]
    )
    assert not len(lost.reads) and not len(lost.transfers)
    lost = plan_exchange(
        old, Placement(np.array([[0, 1, 2, 0, 1, 3, 1, 3]]), 4, (2, 2, 2, 2)), live_ranks=[1, 3]
    )
    assert list(lost.reads) == [(0, 1, 3, 0)]


def test_cycles_and_fans_within_a_rank():
    old = Placement(np.array([[0, 1, 2, 3, 4, 5, 6]]), 7, (7,))
    new = Placement(np.array([[1, 2, 0, 4, 3, 5, 6]]), 7, (7,))
    plan = plan_exchange(old, new)
    assert plan.needs_scratch.tolist() == [[True]] and plan.min_staging_bytes == 1
    ranks = SimulatedRanks.holding(old)
    ranks.carry_out(plan, plan.chunks())
    ranks.check(new, [0])
    assert len(plan.copies) == 7  # 3 + 2 moves and a scratch row for each of the two cycles


def test_no_change_is_no_work():
    old = random_placement(np.random.default_rng(0), 3, 8, [4, 4, 4])
    plan = plan_exchange(old, old)
    assert not plan.chunks() and plan.metadata().complete and plan.bytes_moved == 0
    assert str(plan).startswith("0 of 3 layers change")


def test_even_sources():
    """One expert with four holders goes to four more ranks: each holder sends once."""
    old = Placement(np.array([[0, 1, 0, 2, 0, 3, 0, 4, 1, 2, 2, 3, 3, 4, 4, 1]]), 5, (2,) * 8)
    table = old.physical_to_logical.copy()
    table[0, 8::2] = 0
    plan = plan_exchange(old, Placement(table, 5, (2,) * 8))
    assert (
        sorted(plan.transfers.from_rank.tolist()) == [0, 1, 2, 3]
        and plan.chunks()[0].num_rounds == 1
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"live_ranks": [0, 9]}, "live_ranks"),
        ({"live_ranks": []}, "at least one"),
        ({"live_ranks": [0]}, "only on dead ranks"),
        ({"topology": Topology(4)}, "4 EP ranks"),
        ({"expert_bytes": [1, 2]}, "expert_bytes"),
        ({"expert_bytes": -1}, "expert_bytes"),
    ],
)
def test_bad_input(change, words):
    old = random_placement(np.random.default_rng(0), 3, 8, [4, 4, 4])
    with pytest.raises(PlacementError, match=words):
        plan_exchange(old, old, **change)


def test_other_models_and_bounds_are_refused():
    rng = np.random.default_rng(0)
    old, new = random_placement(rng, 3, 8, [4, 4, 4]), random_placement(rng, 3, 8, [4, 4, 4])
    for other in (
        random_placement(rng, 3, 6, [4, 4, 4]),
        random_placement(rng, 2, 8, [4, 4, 4]),
        random_placement(rng, 3, 8, [8, 8]),
    ):
        with pytest.raises(PlacementError, match="one model"):
            plan_exchange(old, other)
    plan = plan_exchange(old, new, expert_bytes=100)
    with pytest.raises(PlacementError, match=f"needs {plan.min_staging_bytes} bytes"):
        plan.chunks(plan.min_staging_bytes - 1)
    with pytest.raises(PlacementError, match="max_layers 0"):
        plan.chunks(max_layers=0)


def test_maps_of_different_sizes_do_not_mix():
    rng = np.random.default_rng(0)
    plan = plan_exchange(
        random_placement(rng, 3, 8, [4, 4, 4]), random_placement(rng, 3, 8, [5, 4, 3])
    )
    done = plan.metadata()
    assert done.in_force() is plan.old
    done.committed[0] = True
    with pytest.raises(PlacementError, match="row_in_force"):
        done.in_force()
    assert (done.row_in_force(0) == plan.new.physical_to_logical[0]).all()
    done.committed[:] = True
    assert done.in_force() is plan.new


@pytest.mark.parametrize("ranks", [32, 144])
def test_quick_at_the_size_of_r1(ranks):
    rng = np.random.default_rng(1)
    old, new = (random_placement(rng, 58, 256, [288 // ranks] * ranks) for _ in range(2))
    topology = Topology.even(ranks, ranks // 8)

    def once() -> float:
        begin = time.process_time()
        plan_exchange(old, new, topology).chunks()
        return time.process_time() - begin

    once()
    assert (
        min(once() for _ in range(5)) < 0.15
    )  # nearly every slot moves; a few hundredths of a second on a slow core


def test_what_was_lost_is_read_by_all_live_ranks_alike():
    """60 experts on 6 ranks, of which ranks 2 and 3 die.

    The first four ranks hold 15 each, the last two replicas of all that ranks 0 and 1 hold.
    """
    from moe_placement_plugin.rebalancing.lost_experts import place_lost

    table = np.tile(np.concatenate([np.arange(60), np.arange(15), np.arange(15, 30)]), (3, 1))
    old = Placement(table, 60, (15,) * 6)
    live = [0, 1, 4, 5]
    load = np.random.default_rng(0).zipf(1.3, (3, 60)).astype(float)
    plan = plan_exchange(old, place_lost(old, live, load), live_ranks=live)
    assert not len(plan.transfers) and len(plan.reads) == 3 * 30
    for row in range(3):
        per_rank = np.bincount(plan.reads.within(row, row).rank, minlength=6)
        assert per_rank[live].max() - per_rank[live].min() <= 1, per_rank
    assert np.bincount(plan.reads.rank, minlength=6)[live].max() <= 23


@RUNS
@given(exchanges(), st.data())
def test_a_part_is_what_leads_from_one_table_to_the_other(plan, data):
    """As an engine asks for it: some layers at a time, in which the same has to move."""
    kept = data.draw(st.sets(st.sampled_from(plan.new.layer_ids), min_size=1))
    layers = sorted(kept)
    old, new = plan.old.select_layers(layers), plan.new.select_layers(layers)
    tables = (old.physical_to_logical, new.physical_to_logical)
    part = plan.part(*tables, layers, plan.live_ranks, [7] * len(layers))
    assert part.expert_bytes.tolist() == [7] * len(layers)
    capacity = np.maximum(old.slots_per_rank, new.slots_per_rank).tolist()
    alone = SimulatedRanks.holding(old, capacity, dead=np.flatnonzero(~plan.live))
    alone.carry_out(part, part.chunks(max_layers=1))
    alone.check(new, plan.live_ranks)
    tables = (plan.old.physical_to_logical, plan.new.physical_to_logical)
    every = (plan.new.layer_ids, plan.live_ranks)
    assert plan.part(*tables, *every, plan.expert_bytes) is plan
    larger = plan.part(*tables, *every, plan.expert_bytes + 1)
    assert (larger.expert_bytes == plan.expert_bytes + 1).all()
    assert larger.transfers is plan.transfers


def test_what_leads_elsewhere_is_no_part():
    """The fault: an engine that asks for another table, rank or layer than was weighed."""
    rng = np.random.default_rng(0)
    placements = [random_placement(rng, 3, 8, [4, 4, 4]) for _ in range(3)]
    plan = plan_exchange(*placements[:2])
    old, new, other = (p.physical_to_logical for p in placements)
    every, sizes = (0, 1, 2), [1, 1, 1]
    assert plan.part(old, new, every, None, sizes) is plan
    assert plan.part(old, other, every, None, sizes) is None
    assert plan.part(other, new, every, None, sizes) is None
    assert plan.part(new, old, every, None, sizes) is None
    assert plan.part(old, new, every, [0, 1], sizes) is None
    assert plan.part(old, new, (0, 1, 9), None, sizes) is None
    assert plan.part(old, np.pad(new, ((0, 0), (0, 1))), every, None, sizes) is None
    assert plan.part(old[1:], new[1:], (1, 2), None, [1, 1]) is not None
    assert plan.part(old[1:], other[1:], (1, 2), None, [1, 1]) is None
    assert plan.part(old[[2, 0]], new[[2, 0]], (2, 0), None, [1, 1]) is None
    assert plan.part(old[1:], new[1:], (9, 2), None, [1, 1]) is None


def test_a_digest_is_of_the_moves_too():
    """The fault: another sender, which would leave a rank waiting for a message."""
    old = Placement(np.array([[0, 1, 0, 1, 2, 3]]), 4, (2, 2, 2))
    plan = plan_exchange(old, Placement(np.array([[0, 3, 0, 1, 2, 1]]), 4, (2, 2, 2)))
    moves = plan.transfers.array.copy()
    of_1 = plan.transfers.expert == 1
    moves[of_1, 2] = 1 - moves[of_1, 2]  # both ranks hold it, in the same slot
    assert replace(plan, transfers=TransferTable(moves)).digest != plan.digest


def test_tables_have_columns_by_name():
    table = TransferTable(np.arange(18, dtype=np.int32).reshape(3, 6))
    assert table.row.tolist() == [0, 6, 12] and table.to_slot.tolist() == [5, 11, 17]
    first = next(iter(table))
    assert first == (0, 1, 2, 3, 4, 5) and (first.expert, first.from_rank) == (1, 2)
    assert [move.row for move in table.where(np.array([2, 0]))] == [12, 0]
    assert [move.row for move in table.within(6, 12)] == [6, 12]
    assert list(table.among(np.array([6, 7]))) == [(0, *range(7, 12))]
