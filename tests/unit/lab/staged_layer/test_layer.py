"""Test every combination of exchange, matmuls, placement and chunking.

Each is compared with the float64 reference.
"""

from __future__ import annotations

import pytest
import torch

from moe_placement_plugin.lab.staged_layer.reference import reference_moe

from .cases import Case, make

DEEPSEEK = (("scoring", "sigmoid"), ("num_groups", 4), ("top_groups", 2), ("scaling_factor", 2.5))
KINDS = {
    "even": Case(),
    "uneven slots": Case(experts=15, slots_per_rank=(3, 6, 1, 5)),
    "rank without slots": Case(slots_per_rank=(7, 0, 5, 4)),
    "redundant": Case(redundant=8),
    "redundant, SGLang's dealing": Case(redundant=4, dealing="turn"),
    "dead experts": Case(dead=(0, 3, 4, 9)),
    "rank without tokens": Case(tokens=(9, 0, 17, 1)),
    "no tokens at all": Case(tokens=(0, 0, 0, 0)),
    "known tokens": Case(tokens=(5, 0, 12, 3), known_tokens=True),
    "one choice": Case(routing=(("top_k", 1), ("renormalize", False))),
    "DeepSeek-V3 routing": Case(routing=DEEPSEEK, bias=True, shared="plain"),
    "DeepSeek-V2 routing": Case(
        routing=(
            ("num_groups", 4),
            ("top_groups", 2),
            ("renormalize", False),
            ("scaling_factor", 16.0),
        )
    ),
    "shared, gated": Case(shared="gated"),
}


def reference(case: Case) -> list[torch.Tensor]:
    made = make(case)
    return [
        reference_moe(x, logits, made.routing, made.experts, made.shared)
        for x, logits in zip(made.xs, made.logits)
    ]


def check(case: Case, outputs: list[torch.Tensor]) -> None:
    # Largest error seen in float32: 3e-6 of the largest value; bfloat16 keeps 8 bits and rounds
    # five times.
    for output, wanted in zip(outputs, reference(case), strict=True):
        assert output.dtype == getattr(torch, case.dtype) and output.shape == wanted.shape
        if wanted.numel():
            bound = (1e-5 if case.dtype == "float32" else 0.03) * wanted.abs().max()
            assert (output.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
@pytest.mark.parametrize("matmuls", ["torch", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_against_reference(ranks, kind, matmuls, use_ring):
    case = KINDS[kind].but(matmuls=matmuls, use_ring=use_ring)
    check(case, ranks.call("run", case))


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
@pytest.mark.parametrize("matmuls", ["torch", "dense"])
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_ranks(ranks, ep, matmuls, use_ring):
    case = Case(
        ep=ep,
        redundant=ep // 2,
        routing=DEEPSEEK,
        bias=True,
        shared="plain",
        use_ring=use_ring,
        matmuls=matmuls,
        seed=ep,
    )
    check(case, ranks.call("run", case))


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
def test_bfloat16(ranks, use_ring):
    case = Case(dtype="bfloat16", use_ring=use_ring, shared="plain")
    check(case, ranks.call("run", case))


CHUNKED = {
    "ring by tokens": {"token_chunks": 3},
    "ring by more chunks than tokens": {"token_chunks": 16},
    "ring by embedding": {"embedding_chunks": 3},
    "ring by uneven embedding": {"embedding_chunks": 2},
    "all-to-all by tokens": {"use_ring": False, "token_chunks": 3},
    "all-to-all by more chunks than tokens": {"use_ring": False, "token_chunks": 16},
    "ring, own tokens first": {"own_first": True},
    "all-to-all, own tokens first": {"own_first": True, "use_ring": False},
}


@pytest.mark.parametrize("matmuls", ["torch", "dense"])
@pytest.mark.parametrize("how", CHUNKED)
def test_chunked_is_whole_bit_for_bit(ranks, how, matmuls):
    for kind in (
        Case(tokens=(9, 0, 40, 1), redundant=8, shared="plain"),
        Case(
            experts=15,
            slots_per_rank=(3, 6, 1, 5),
            dtype="bfloat16",
            routing=DEEPSEEK[:1],
            tokens=(5, 18, 2, 33),
            known_tokens=True,
        ),
    ):
        chunked = kind.but(matmuls=matmuls, **CHUNKED[how])
        whole = chunked.but(token_chunks=1, embedding_chunks=1, own_first=False)
        outputs = ranks.call("run", chunked)
        check(chunked, outputs)
        for one, other in zip(outputs, ranks.call("run", whole), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("use_ring", [True, False], ids=["ring", "all-to-all"])
@pytest.mark.parametrize("kind", KINDS)
def test_own_tokens_first(ranks, kind, use_ring):
    for ep in (1, 2, 8) if kind == "even" else (4,):
        case = KINDS[kind].but(ep=ep, own_first=True, use_ring=use_ring)
        outputs = ranks.call("run", case)
        check(case, outputs)
        for one, other in zip(outputs, ranks.call("run", case.but(own_first=False)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ep", [4, 8])
def test_both_exchanges_give_the_same_bits(ranks, ep, dtype):
    case = Case(
        ep=ep,
        redundant=4,
        routing=(("top_k", 8),),
        dtype=dtype,
        tokens=(13, 0, 5, 20, 1, 9, 2, 7)[:ep],
    )
    ring, all_to_all = ranks.call("run", case), ranks.call("run", case.but(use_ring=False))
    assert all(torch.equal(one, other) for one, other in zip(ring, all_to_all, strict=True))
