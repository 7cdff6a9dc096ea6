"""Check that the staged layer computes what it must on this device."""

from __future__ import annotations

import numpy as np
import torch

from .... import Placement
from ....core.placement import even_slots
from ...bench.layer.shapes import LayerShape
from ...staged_layer import PlacedExperts, Routing, StagedMoE
from ...staged_layer.dispatching import keep_local
from ...staged_layer.matmuls.align import align_blocks
from ...staged_layer.reference import reference_moe
from .process import Process

ROUNDING = 2.0**-6
"""Say by which share of the largest value chunked and whole may differ in bfloat16.

That is twice what either may differ from the reference: tiles depend on the batch, and the kernels
round gate and up before the activation only if they have multiplied all columns at once.
"""

CHUNKINGS = {
    "whole": {},
    "3 token chunks": {"token_chunks": 3},
    "2 embedding chunks": {"embedding_chunks": 2},
    "own tokens first": {"own_first": True},
}
"""Name -> how the layer is called."""


def check(process: Process) -> bool:
    """Compare both exchanges, whole and chunked, with the float64 reference.

    The align step is compared with the engine's.
    """
    torch.manual_seed(0)  # the same weights on every rank
    shape, size, rank = LayerShape(256, 128, 16, 4, 1, 1), process.group.size, process.group.rank
    experts = process.weights(shape.experts, shape)
    redundant = 2 * size if size > 1 else 0
    slots = [n + (r % 2) for r, n in enumerate(even_slots(shape.experts + redundant, size))]
    placement = _shuffled_placement(slots, shape.experts)
    routing = Routing(
        shape.experts, shape.top_k, "sigmoid", num_groups=4, top_groups=2, scaling_factor=2.5
    )
    counts = [37 * r % 100 for r in range(1, size + 1)]
    torch.manual_seed(1 + rank)
    x = torch.randn(counts[rank], shape.hidden, device=process.device).to(process.dtype)
    logits = torch.randn(len(x), shape.experts, device=process.device)
    wanted = reference_moe(x, logits, routing, experts).to(process.device)
    fine = True
    for use_ring in (True, False):
        layer = StagedMoE(
            routing,
            PlacedExperts.of(placement, 0, rank, process.device),
            experts.shard(placement, 0, rank),
            process.matmuls,
            process.group,
            None,
            use_ring,
        )
        fine &= _check_layer(process, layer, x, logits, wanted)
    if process.on_gpu and hasattr(process.matmuls, "align"):
        fine &= _check_align(process)
    return fine


def _check_layer(
    process: Process,
    layer: StagedMoE,
    x: torch.Tensor,
    logits: torch.Tensor,
    wanted: torch.Tensor,
) -> bool:
    """Compare one exchange, in every chunking that it has."""
    bound = 0.03 if process.dtype == torch.bfloat16 else 1e-5
    whole = layer(x, logits)
    largest = wanted.abs().max()
    fine = True
    for name, chunking in CHUNKINGS.items():
        if not layer.use_ring and "embedding" in name:
            continue
        output = layer(x, logits, **chunking)
        error = float((output.double() - wanted).abs().max() / largest)
        apart = float((output.double() - whole.double()).abs().max() / largest)
        good = process.agree(error <= bound and apart <= (ROUNDING if process.on_gpu else 0))
        fine &= good
        way = f"{'ring' if layer.use_ring else 'all-to-all'}, {name}"
        process.say(
            f"{way}: error {error:.1e} of the largest value, {apart:.1e} from whole: "
            f"{'ok' if good else 'WRONG'}"
        )
    return fine


def _check_align(process: Process) -> bool:
    """Compare the engine's align step with the one written in torch.

    Up to the order within an expert, which CUDA leaves open.
    """
    slots = torch.randint(-1, 9, (77, 3), device=process.device, dtype=torch.int32)
    output = keep_local(slots, torch.rand(77, 3, device=process.device), 9, False)
    ids, experts, padded = process.matmuls.align(output, {"BLOCK_SIZE_M": 16})
    length = int(padded)
    ours = align_blocks(slots, 16, 9, process.matmuls.zeroes_elsewhere)
    same = length == int(ours[2]) and experts[: length // 16].tolist() == ours[1].tolist()
    same = same and _by_expert(ids[:length], experts) == _by_expert(ours[0], ours[1])
    process.say(f"align step: {'ok' if same else 'DIFFERS from the engine'}")
    return same


def _shuffled_placement(sizes: list[int], experts: int) -> Placement:
    """Deal experts in no order to ranks of the given sizes, none twice on a rank.

    Each lies on a rank at least once.
    """
    generator = np.random.default_rng(0)
    left = np.concatenate([generator.permutation(experts) for _ in range(3)]).tolist()
    slots: list[int] = []
    for size in sizes:
        mine: list[int] = []
        while len(mine) < size:
            mine.append(left.pop(next(i for i, e in enumerate(left) if e not in mine)))
        slots += mine
    return Placement([slots], experts, tuple(sizes))


def _by_expert(ids: torch.Tensor, experts: torch.Tensor) -> dict[int, list[int]]:
    """Group the ids of aligned blocks of 16 by expert, in order within each."""
    found: dict[int, list[int]] = {}
    for block, expert in zip(ids.view(-1, 16).tolist(), experts.tolist()):
        found.setdefault(expert, []).extend(block)
    return {expert: sorted(values) for expert, values in found.items()}
