"""Exchanges between real processes over gloo."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.core.topology import Topology
from moe_placement_plugin.exchange.plan import ExchangePlan, plan_exchange

from .cases import drifted, random_placement


def check_weights(weights, placement: Placement, rank: int, rows=None) -> None:
    """All parameters of all slots of a rank hold what the placement says, to the bit."""
    import torch

    from .ranks import SHAPES, expert_tensor

    for row in range(placement.num_layers) if rows is None else rows:
        for slot, expert in enumerate(placement.local_experts(row, rank).tolist()):
            for parameter in range(len(SHAPES)):
                wanted = (
                    expert_tensor(row, expert, parameter).contiguous().view(torch.uint8).numpy()
                )
                assert (weights[row][parameter][slot] == wanted).all(), (
                    rank,
                    row,
                    slot,
                    expert,
                    parameter,
                )


def carry_out(ranks, plan: ExchangePlan, limits: dict, by_layer: bool = False):
    from .ranks import exchange

    results = ranks.run(exchange, plan.new.num_ranks, plan, limits, by_layer)
    for rank, result in enumerate(results):
        if result is not None:
            check_weights(result[0], plan.new, rank)
    return results


@pytest.mark.parametrize(
    "slots, experts",
    [([6, 6], 10), ([5, 5, 5, 5], 16), ([3, 0, 7, 4], 9), ([4] * 8, 24)],
    ids=["2 ranks", "4 ranks", "uneven", "8 ranks"],
)
def test_chunked_and_whole_end_alike(ranks, slots, experts):
    from .ranks import SHAPES

    rng = np.random.default_rng(len(slots))
    old = random_placement(rng, 4, experts, slots)
    plan = plan_exchange(
        old,
        random_placement(rng, 4, experts, slots),
        Topology(len(slots), tuple(r % 2 for r in range(len(slots)))),
    )
    whole = carry_out(ranks, plan, {})
    padded = plan.staging_needed([64 * len(SHAPES)] * 4).max()
    cut = carry_out(ranks, plan, {"staging_bytes": int(padded)}, by_layer=True)
    single = carry_out(ranks, plan, {"max_layers": 1, "batch_bytes": 1})  # a round a batch
    for a, b, c in zip(whole, cut, single):
        for x, y, z in zip(a[0], b[0], c[0]):
            assert all((p == q).all() and (p == r).all() for p, q, r in zip(x, y, z))
        assert a[2].chunks == 1 and b[2].chunks > 1 and c[2].chunks == 4
        assert b[2].staging_bytes <= padded
        assert not a[1]
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in SHAPES)
    assert (
        sum(r[2].bytes_received for r in cut)
        == sum(r[2].bytes_sent for r in cut)
        == len(plan.transfers) * size
    )


def test_other_numbers_of_slots(ranks):
    rng = np.random.default_rng(3)
    plan = plan_exchange(
        random_placement(rng, 3, 8, [4, 4, 4]), random_placement(rng, 3, 8, [2, 6, 5])
    )
    carry_out(ranks, plan, {"max_layers": 2})


@pytest.mark.parametrize("dead", [[3], [0, 1]])
def test_dead_ranks_are_left_out_and_only_what_died_is_read(ranks, dead):
    rng = np.random.default_rng(4)
    old = random_placement(rng, 3, 8, [6, 6, 6, 6])
    live = [r for r in range(4) if r not in dead]
    new = random_placement(rng, 3, 8, [6, 6, 6, 6], live)
    plan = plan_exchange(old, new, live_ranks=live)
    results = carry_out(ranks, plan, {"max_layers": 1})
    asked = [r for result in results if result for r in result[1]]
    lost = {
        (row, e)
        for row in range(3)
        for e in range(8)
        if not any(e in old.local_experts(row, r) for r in live)
    }
    assert set(asked) == lost and len(asked) == len(plan.reads)


def test_a_few_moves(ranks):
    """The shape that rebalancing produces: most slots stay."""
    rng = np.random.default_rng(5)
    old = random_placement(rng, 6, 16, [5] * 4)
    plan = plan_exchange(old, drifted(rng, old, share=0.1))
    carry_out(ranks, plan, {"max_layers": 2})


def test_exchanges_of_a_server_keep_their_staging_memory_and_leave_no_keys_behind(ranks):
    from .ranks import by_an_exchanger

    rng = np.random.default_rng(6)
    keys = []
    for number in (6, 12):
        placements = [random_placement(rng, 4, 12, [6] * 3)]
        for _ in range(number):
            placements.append(drifted(rng, placements[-1], share=0.2))
        results = ranks.run(by_an_exchanger, 3, placements, None)
        for rank, (weights, _, buffers) in enumerate(results):
            check_weights(weights, placements[-1], rank)
            assert buffers == 1, "staging memory was allocated again"
        keys.append(max(found for _, found, _ in results))
    assert 0 < keys[1] <= keys[0] + 8, keys  # of the last two exchanges, which may have more chunks


@pytest.mark.parametrize("dies", [0, 2])
def test_a_server_goes_on_when_a_rank_has_died_be_it_the_stores(ranks, dies):
    from .ranks import by_an_exchanger

    rng = np.random.default_rng(7)
    live = [r for r in range(3) if r != dies]
    placements = [random_placement(rng, 3, 8, [6] * 3) for _ in range(3)]
    placements += [random_placement(rng, 3, 8, [6] * 3, live), drifted(rng, placements[2])]
    placements[4] = random_placement(rng, 3, 8, [6] * 3, live)
    results = ranks.run(by_an_exchanger, 3, placements, dies)
    assert results[dies] is None
    for rank in live:
        check_weights(results[rank][0], placements[-1], rank)
