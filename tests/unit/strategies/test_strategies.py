import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_placement_plugin import (
    ExpertLoad,
    PlacementError,
    PlacementRequest,
    Topology,
    get_strategy,
    strategy_names,
)
from moe_placement_plugin.strategies import Strategy, registry


@st.composite
def requests(draw):
    experts = draw(st.integers(1, 40))
    ranks = draw(st.integers(1, 9))
    most = ranks * experts - experts
    redundant = draw(st.integers(0, min(most, 12)))
    layers = draw(st.integers(1, 3))
    counts = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 100, (2, layers, experts))
    return PlacementRequest(layers, experts, Topology(ranks), redundant, load=ExpertLoad(counts))


@pytest.mark.slow
@settings(deadline=None)
@given(requests(), st.sampled_from(["linear", "balanced", "zigzag", "eplb"]))
def test_every_strategy_gives_a_valid_even_placement(request_, name):
    p = get_strategy(name).place(request_)  # Placement itself checks completeness and duplicates
    assert p.num_redundant == request_.num_redundant and p.num_ranks == request_.topology.num_ranks
    assert max(p.slots_per_rank) - min(p.slots_per_rank) <= 1
    assert p.strategy == name


def place(name, experts, ranks, **more):
    return get_strategy(name).place(PlacementRequest(1, experts, Topology(ranks), **more))


def test_balanced_is_4_4_4_4_4_4_3_3_for_30_on_8():
    p = place("balanced", 30, 8)
    assert p.slots_per_rank == (4, 4, 4, 4, 4, 4, 3, 3)
    np.testing.assert_array_equal(p.physical_to_logical[0], np.arange(30))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_puts_expert_e_on_rank_e_mod_ranks(ranks):
    p = place("zigzag", 30, ranks)
    for rank in range(ranks):
        np.testing.assert_array_equal(p.local_experts(0, rank), np.arange(rank, 30, ranks))


def test_zigzag_staggers_a_group_over_all_ranks():
    p = place("zigzag", 32, 4)  # groups of 8: each rank gets 2 of each group
    for rank in range(4):
        groups = p.local_experts(0, rank) // 8
        assert sorted(groups.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_zigzag_with_uneven_slots_passes_over_full_ranks():
    p = place("zigzag", 5, 3, slots_per_rank=(1, 4, 0))
    assert p.slots_per_rank == (1, 4, 0) and p.local_experts(0, 0).tolist() == [0]


def test_linear_redundancy_repeats_experts_from_zero_as_vllm_does():
    p = place("linear", 8, 4, num_redundant=4)
    assert p.physical_to_logical[0].tolist() == [*range(8), 0, 1, 2, 3]


def test_eplb_beats_linear_on_a_skewed_load():
    counts = np.r_[np.full(8, 1000), np.full(24, 10)][None, None]
    p = get_strategy("eplb").place(PlacementRequest(1, 32, Topology(4), load=ExpertLoad(counts)))
    q = place("linear", 32, 4)
    assert p.overall_balancedness(counts[0]) > 0.99 > 0.4 > q.overall_balancedness(counts[0])


def test_eplb_without_a_load_says_so():
    with pytest.raises(
        PlacementError, match="eplb places experts by a recorded load and has none.*zigzag"
    ):
        place("eplb", 8, 2)


def test_unknown_strategy_lists_the_known_ones():
    with pytest.raises(
        PlacementError,
        match="unknown expert placement strategy 'zigzga': choose one of linear, balanced, zigzag",
    ):
        get_strategy("zigzga")
    assert get_strategy("round_robin").name == "zigzag"


class Reverse(Strategy):
    name = "reverse"

    def place(self, request):
        return self._placement(request, np.arange(request.num_slots)[::-1])


class FakePoint:
    def __init__(self, name, loaded):
        self.name, self.value, self.loaded = name, "third.party:thing", loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def third_party(monkeypatch):
    points = []
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry._third_party.cache_clear()
    yield points
    registry._third_party.cache_clear()


def test_third_party_strategy_by_entry_point(third_party):
    third_party.append(FakePoint("reverse", Reverse))
    assert "reverse" in strategy_names()
    assert place("reverse", 4, 2).physical_to_logical[0].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    "name, loaded, message",
    [
        ("zigzag", Reverse, "takes a name that is in use"),
        ("broken", ImportError("no module x"), "failed to import: no module x"),
        ("other", object(), "is no Strategy"),
    ],
)
def test_bad_third_party_strategies(third_party, name, loaded, message):
    third_party.append(FakePoint(name, loaded))
    with pytest.raises(PlacementError, match=message):
        get_strategy(name if name != "zigzag" else "something")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 8, Topology(2)), "nothing to place"),
        ((1, 8, Topology(2), -1), "-1 redundant"),
        ((1, 4, Topology(2), 6), "second copy on a rank is of no use"),
        ((1, 8, Topology(2), 0, (3, 4)), "8 in all"),
    ],
)
def test_bad_requests(arguments, message):
    with pytest.raises(PlacementError, match=message):
        PlacementRequest(*arguments)


def test_topology():
    t = Topology.even(8, 2)
    assert t.node_of_rank == (0, 0, 0, 0, 1, 1, 1, 1) and t.num_nodes == 2 and t.speed == (1.0,) * 8
    for make, message in [
        (lambda: Topology(0), "at least 1"),
        (lambda: Topology(2, (0,)), "one per rank"),
        (lambda: Topology(2, (0, -1)), "numbered from 0"),
        (lambda: Topology(2, speed=(1.0, 0.0)), "positive"),
        (lambda: Topology(2, speed=(1.0, float("nan"))), "positive"),
        (lambda: Topology.even(8, 3), "same number of ranks"),
    ]:
        with pytest.raises(PlacementError, match=message):
            make()


def near(locality="soft", topology=None, groups=1, pairs=None):
    """Plan 2 layers of 16 experts, of which with ``pairs`` the even ones are chosen together."""
    counts = np.random.default_rng(3).integers(50, 100, (1, 2, 16))
    together = None
    if pairs:
        together = np.zeros((2, 16, 16), np.int64)
        together[:, ::2, ::2] = together[:, 1::2, 1::2] = 1000
        together[:, range(16), range(16)] = 0
    topology = topology or Topology(4, (0, 1, 0, 1))
    load = ExpertLoad(counts, coactivation=together)
    return get_strategy("eplb").place(
        PlacementRequest(2, 16, topology, num_groups=groups, load=load, locality=locality)
    )


def nodes_of(placement, topology, layer):
    return np.array(topology.node_of_rank)[
        placement.rank_of_slot[np.argsort(placement.physical_to_logical[layer])]
    ]


def test_soft_locality_brings_together_what_is_chosen_together():
    topology = Topology(4, (0, 1, 0, 1))  # ranks in no order of nodes
    placement = near(pairs=True)
    for layer in range(2):
        nodes = nodes_of(placement, topology, layer)
        assert len(set(nodes[::2])) == 1 and len(set(nodes[1::2])) == 1 and nodes[0] != nodes[1]


@pytest.mark.slow
@pytest.mark.parametrize("locality", ["node", "soft"])
def test_groups_stay_on_their_nodes(locality):
    topology = Topology(4, (0, 1, 0, 1))
    placement = near(locality, groups=4)
    crossing = sum(
        len(set(nodes_of(placement, topology, layer)[g * 4 : g * 4 + 4])) - 1
        for layer in range(2)
        for g in range(4)
    )
    assert crossing == 0 if locality == "node" else crossing < 8


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"locality": "near"}, "choose one of none, node, soft"),
        ({"topology": Topology(4)}, "all 4 EP ranks on one node"),
        (
            {"groups": 1},
            "1 expert groups do not divide over 2 nodes; soft also takes a load with co-activation",
        ),
        ({"locality": "node", "groups": 3}, "3 expert groups do not divide over 2 nodes"),
    ],
)
def test_locality_that_cannot_be_had(more, words):
    with pytest.raises(PlacementError, match=words):
        near(**more)
