"""Describe the MoE layers that ``moe-placement bench layer`` knows, and their loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....core.errors import PlacementError
from ....core.load import ExpertLoad
from ....formats.load_file import read_load
from ....simulation.cluster import Workload, align


@dataclass(frozen=True)
class LayerShape:
    """Describe one MoE layer, from the model's config.json.

    All are measured in bfloat16 with plain SwiGLU and without biases.

    Attributes:
        hidden: width of a token.
        intermediate: width of an expert.
        experts: logical experts.
        top_k: experts per token.
        groups: expert groups.
        layers: MoE layers of the model.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    groups: int
    layers: int


SHAPES = {
    "r1": LayerShape(7168, 2048, 256, 8, 8, 58),
    "v2-lite": LayerShape(2048, 1408, 64, 6, 1, 26),
    "qwen3-30b-a3b": LayerShape(2048, 768, 128, 8, 1, 48),
    "qwen3-235b-a22b": LayerShape(4096, 1536, 128, 8, 1, 94),
    "gpt-oss-120b": LayerShape(2880, 2880, 128, 4, 1, 36),
    "gpt-oss-20b": LayerShape(2880, 2880, 32, 4, 1, 24),
    "tiny": LayerShape(128, 64, 16, 4, 1, 4),
}
"""``tiny`` is no model: it is for machines without a GPU."""


def find_shape(name: str) -> LayerShape:
    """Return a shape by name.

    Raises:
        PlacementError: when there is none.
    """
    if name not in SHAPES:
        raise PlacementError(f"shape {name!r}: choose from {', '.join(SHAPES)}")
    return SHAPES[name]


def read_recordings(paths: Sequence[Path], shape: LayerShape, name: str) -> ExpertLoad:
    """Read recorded loads of one model as one load.

    They are what recorders write, or token-level traces (``.npz`` with ``topk_ids``).

    Raises:
        PlacementError: when a file is no load, or of a model with other experts.
    """
    workloads = []
    for path in paths:
        load = _token_trace(path, shape.experts) if path.suffix == ".npz" else read_load(path)
        if load.num_experts != shape.experts:
            raise PlacementError(
                f"{path} has {load.num_experts} experts, {name} has {shape.experts}: give a load "
                "of that model"
            )
        workloads.append(Workload(str(path), load))
    return ExpertLoad.concatenate([w.load for w in align(workloads)])


def _token_trace(path: Path, experts: int) -> ExpertLoad:
    try:
        with np.load(path, allow_pickle=False) as data:
            ids = data["topk_ids"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise PlacementError(
            f"{path} is no token-level trace ({error}): give an .npz with topk_ids [layers, "
            "tokens, top_k]"
        ) from None
    experts = max(experts, int(ids.max()) + 1)
    return ExpertLoad(np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in ids]))


def synthetic_load(shape: LayerShape, skew: float, seed: int = 0) -> ExpertLoad:
    """Make a load whose experts follow Zipf's law with exponent ``skew``.

    They are in another order in every layer.
    """
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, shape.experts + 1, dtype=np.float64) ** -skew
    counts = np.stack([rng.permutation(popularity) for _ in range(shape.layers)])
    return ExpertLoad(
        np.round(counts / popularity.sum() * 1e7).astype(np.int64),
        metadata={"source": f"synthetic, zipf {skew}"},
    )


def draw_step(share: np.ndarray, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the expert choices of one step, int64 ``[tokens, top_k]``, distinct within a token.

    Counts per expert are drawn from ``share [experts]`` (recorded shares, choices independent of
    each other), none above one per token. They are dealt to the tokens in turn, which keeps a
    token's choices distinct; which experts meet in a token is left to chance.

    Raises:
        PlacementError: when fewer experts than ``top_k`` are ever chosen.
    """
    if np.count_nonzero(share) < top_k:
        raise PlacementError(
            f"a layer in which {np.count_nonzero(share)} experts were chosen, for top-{top_k}: "
            "record more tokens"
        )
    counts = rng.multinomial(tokens * top_k, share / share.sum())
    while (spare := int(np.maximum(counts - tokens, 0).sum())) > 0:
        counts = np.minimum(counts, tokens)
        room = (counts < tokens) * share
        counts = counts + rng.multinomial(spare, room / room.sum())
    order = rng.permutation(share.size)
    flat = np.repeat(order, counts[order])
    return flat.reshape(top_k, tokens).T[rng.permutation(tokens)]
