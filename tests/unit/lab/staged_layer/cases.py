"""Make a case of the staged layer, the same in every process, from its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_placement_plugin import Placement
from moe_placement_plugin.core.placement import even_slots
from moe_placement_plugin.lab.staged_layer import (
    EpExchange,
    EpGroup,
    ExpertWeights,
    PlacedExperts,
    Routing,
    SharedExperts,
    StagedMoE,
    find_matmuls,
    route,
)

HIDDEN, INTERMEDIATE = 192, 32


@dataclass(frozen=True)
class Case:
    """Describe one layer and one batch.

    Attributes:
        ep: EP ranks.
        tokens: tokens of each rank.
        slots_per_rank: slots of each rank; even when empty.
        redundant: redundant experts.
        dead: experts that no token chooses.
    """

    ep: int = 4
    tokens: tuple[int, ...] = ()
    experts: int = 16
    slots_per_rank: tuple[int, ...] = ()
    redundant: int = 0
    dead: tuple[int, ...] = ()
    routing: tuple[tuple[str, object], ...] = ()
    bias: bool = False
    shared: str = ""
    use_ring: bool = True
    matmuls: str = "torch"
    token_chunks: int = 1
    embedding_chunks: int = 1
    dealing: str = "hash"
    dtype: str = "float32"
    known_tokens: bool = False
    own_first: bool = False
    seed: int = 0

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        return self.tokens or even_slots(11 * self.ep + 1, self.ep)


@dataclass(frozen=True)
class Made:
    """Hold what a case stands for."""

    routing: Routing
    placement: Placement
    experts: ExpertWeights
    shared: SharedExperts | None
    xs: list[torch.Tensor]
    logits: list[torch.Tensor]


def make(case: Case) -> Made:
    """Make the tensors of a case."""
    rng = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(getattr(torch, case.dtype))

    bias = torch.randn(case.experts, generator=rng) * 0.3 if case.bias else None
    routing = Routing(case.experts, **{"top_k": 4, **dict(case.routing)}, correction_bias=bias)
    experts = ExpertWeights(
        normal(case.experts, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        normal(case.experts, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    )
    shared = None
    if case.shared:
        gate = normal(1, HIDDEN, scale=HIDDEN**-0.5) if case.shared == "gated" else None
        shared = SharedExperts(
            normal(64, HIDDEN, scale=HIDDEN**-0.5), normal(HIDDEN, 32, scale=32**-0.5), gate
        )
    xs = [normal(n, HIDDEN) for n in case.tokens_per_rank]
    logits = [torch.randn(n, case.experts, generator=rng) for n in case.tokens_per_rank]
    for part in logits:
        part[:, list(case.dead)] = -30.0
    return Made(routing, place(case), experts, shared, xs, logits)


def place(case: Case) -> Placement:
    """Place experts in no order at all, replicas on different ranks."""
    rng = np.random.default_rng(case.seed)
    slots = case.slots_per_rank or even_slots(case.experts + case.redundant, case.ep)
    order = rng.permutation(case.experts)
    # Replicas of the first experts, put in the last slots, whose ranks do not hold the original.
    table = np.concatenate([order, order[: sum(slots) - case.experts]])
    return Placement(table[None], case.experts, slots)


def layer(case: Case, made: Made, group: EpGroup) -> StagedMoE:
    """Make the layer of one rank."""
    return StagedMoE(
        made.routing,
        PlacedExperts.of(made.placement, 0, group.rank),
        made.experts.shard(made.placement, 0, group.rank),
        find_matmuls(case.matmuls),
        group,
        made.shared,
        case.use_ring,
        case.dealing,
    )


def run(case: Case, group: EpGroup) -> torch.Tensor:
    """Return the output of this rank, ``[its tokens, hidden]``."""
    made = make(case)
    return layer(case, made, group)(
        made.xs[group.rank],
        made.logits[group.rank],
        case.token_chunks,
        case.embedding_chunks,
        case.tokens_per_rank if case.known_tokens else None,
        case.own_first,
    )


def routed(case: Case, group: EpGroup) -> tuple[torch.Tensor, ...]:
    """Return rows, group sizes, local slots and weights of this rank after `route`."""
    made = make(case)
    placed = PlacedExperts.of(made.placement, 0, group.rank)
    x, output, _ = route(
        made.xs[group.rank],
        made.logits[group.rank],
        made.routing,
        placed,
        EpExchange(group, case.use_ring),
    )
    return x, output.group_sizes, output.local_slots, output.weights
