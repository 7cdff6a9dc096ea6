"""Test what the stages promise each other, and their refusals."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from moe_placement_plugin import Placement, PlacementError
from moe_placement_plugin.lab.staged_layer import (
    EpExchange,
    EpGroup,
    ExpertHidden,
    ExpertWeights,
    PlacedExperts,
    RouteMetadata,
    RouteOutput,
    Routing,
    Selection,
    find_matmuls,
    gmm_down,
    gmm_up,
    route,
    select_experts,
    unroute,
)
from moe_placement_plugin.lab.staged_layer.dispatching import keep_local

from .cases import HIDDEN, Case, layer, make


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
def test_route_filters_everything_together(ranks, use_ring):
    case = Case(
        tokens=(9, 0, 17, 1), redundant=8, slots_per_rank=(8, 5, 2, 9), use_ring=use_ring, dead=(3,)
    )
    made = make(case)
    tables = [PlacedExperts.of(made.placement, 0, r) for r in range(case.ep)]
    wanted: list[dict] = [{} for _ in range(case.ep)]
    for x, logits in zip(made.xs, made.logits):
        experts, weights = select_experts(logits, made.routing)
        slots = tables[0].deal(experts)
        assert (
            torch.tensor(made.placement.physical_to_logical[0].tolist())[slots] == experts
        ).all()
        for token in range(len(x)):
            for slot, weight in zip(slots[token].tolist(), weights[token].tolist()):
                rank = int(made.placement.rank_of_slot[slot])
                local = slot - int(made.placement.rank_offsets[rank])
                wanted[rank].setdefault(local, []).append((x[token, 0].item(), weight))
    for rank, (rows, group_sizes, slots, weights) in enumerate(ranks.call("routed", case)):
        found: dict = {}
        for row, choice in (slots >= 0).nonzero().tolist():
            found.setdefault(int(slots[row, choice]), []).append(
                (rows[row, 0].item(), weights[row, choice].item())
            )
        assert {k: sorted(v) for k, v in found.items()} == {
            k: sorted(v) for k, v in wanted[rank].items()
        }
        assert group_sizes.tolist() == [
            len(found.get(s, ())) for s in range(made.placement.slots_per_rank[rank])
        ]
        assert (weights[slots < 0] == 0).all()


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
def test_engines_kernels_can_read_what_route_returns_by_address(use_ring):
    """vLLM's align step takes a pointer.

    On a GPU the two halves of what the all-to-all brings made it read weights as slots.
    """
    made = make(Case(ep=1, tokens=(23,)))
    placed = layer(Case(ep=1), made, EpGroup.single()).placed
    _, output, _ = route(
        made.xs[0], made.logits[0], made.routing, placed, EpExchange(use_ring=use_ring)
    )
    assert all(t.is_contiguous() for t in (output.local_slots, output.buckets, output.weights))
    local = torch.tensor([[0, -1, 2], [-1, 1, 0]])
    kept = keep_local(local.T, torch.ones(3, 2), 3, False)
    assert (
        kept.local_slots.is_contiguous()
        and kept.local_slots.dtype == kept.buckets.dtype == torch.int32
    )
    assert kept.buckets.tolist() == [[0, 3], [3, 1], [2, 0]] and kept.weights.tolist() == [
        [1, 0],
        [0, 1],
        [1, 1],
    ]
    assert kept.group_sizes.tolist() == [2, 1, 1]


def test_every_field_is_documented():
    for kind in (
        Selection,
        RouteOutput,
        RouteMetadata,
        ExpertHidden,
        PlacedExperts,
        ExpertWeights,
        Routing,
    ):
        assert kind.__dataclass_params__.frozen
        for field in fields(kind):
            assert f"\n        {field.name}: " in kind.__doc__, f"{kind.__name__}.{field.name}"


def test_replicas_are_dealt_as_the_engines_do():
    placement = Placement([[0, 1, 2, 0, 1, 0]], 3, (2, 1, 1, 1, 1))
    placed = PlacedExperts.of(placement, 0, 0)
    experts = torch.tensor([[0, 1]] * 60 + [[2, 0]])
    by_hash, by_turn = placed.deal(experts), placed.deal(experts, dealing="turn")
    table = {0: [0, 3, 5], 1: [1, 4], 2: [2]}
    for token, row in enumerate(experts.tolist()):
        for choice, expert in enumerate(row):
            replicas = table[expert]
            assert (
                by_hash[token, choice]
                == replicas[(token * 2654435769 & 0xFFFFFFFF) % len(replicas)]
            )
            assert by_turn[token, choice] == replicas[token % len(replicas)]
    # A chunk is dealt as the batch is.
    assert torch.equal(placed.deal(experts[7:], first_token=7), by_hash[7:])
    with pytest.raises(PlacementError, match="choose hash"):
        placed.deal(experts, dealing="random")


def test_stages_one_by_one_are_the_layer():
    case = Case(ep=1, tokens=(23,), shared="plain")
    made = make(case)
    whole = layer(case, made, EpGroup.single())
    x, logits, weights, matmuls = made.xs[0], made.logits[0], whole.weights, whole.matmuls
    rows, output, metadata = route(x, logits, made.routing, whole.placed)
    assert output.complete and output.num_slots == case.experts and output.num_rows == 23
    first = gmm_up(rows[:, :64], output, weights, matmuls)
    with pytest.raises(PlacementError, match="64 of 192 columns"):
        gmm_down(first, output, weights, matmuls)
    hidden = gmm_up(rows[:, 64:], output, weights, matmuls, into=first)
    partial = torch.cat(
        [gmm_down(hidden, output, weights, matmuls, *part) for part in ((0, 128), (128, None))],
        dim=1,
    )
    assert torch.equal(unroute(partial, metadata, shared=made.shared(x)), whole(x, logits))


def test_refusals():
    made = make(Case(ep=1, tokens=(5,)))
    one, x, logits = layer(Case(ep=1), made, EpGroup.single()), made.xs[0], made.logits[0]
    elsewhere = PlacedExperts.of(make(Case()).placement, 0, 2)
    refused = {
        "rank 2 of 4 on rank 0 of a group of 1": lambda: route(x, logits, made.routing, elsewhere),
        "rank 4 of a placement for 4 ranks": lambda: PlacedExperts.of(make(Case()).placement, 0, 4),
        "logits of shape": lambda: route(x, logits[:, 1:], made.routing, one.placed),
        r"they must be \[tokens, hidden\]": lambda: route(x[1:], logits, made.routing, one.placed),
        "they must agree": lambda: one(x, logits, tokens_per_rank=[4]),
        "give 1 or more of one": lambda: one(x, logits, 2, 2),
        "give 1 of each": lambda: one(x, logits, 2, 1, None, True),
        "at most 3": lambda: one(x, logits, 1, 4),
        "rows and 16 slots": lambda: gmm_up(
            x[1:], route(x, logits, made.routing, one.placed)[1], one.weights, one.matmuls
        ),
        "in all, the weights": lambda: gmm_up(
            x.repeat(1, 2), route(x, logits, made.routing, one.placed)[1], one.weights, one.matmuls
        ),
        "scoring 'tanh'": lambda: Routing(8, 2, "tanh"),
        "3 of 2 groups": lambda: Routing(8, 2, num_groups=2, top_groups=3),
        "can choose 1 to 4": lambda: Routing(8, 5, num_groups=2),
        "correction_bias of shape": lambda: Routing(8, 2, correction_bias=torch.zeros(7)),
        "w13": lambda: ExpertWeights(torch.zeros(2, 8, HIDDEN), torch.zeros(2, HIDDEN, 8)),
        "not initialised": EpGroup,
    }
    for says, call in refused.items():
        with pytest.raises(PlacementError, match=says):
            call()
    one.use_ring = False
    with pytest.raises(PlacementError, match="with the all-to-all"):
        one(x, logits, 1, 2)


def test_matmuls_are_named():
    assert find_matmuls().name == f"torch {torch.__version__}"
    assert find_matmuls("dense").name.startswith("dense torch")
