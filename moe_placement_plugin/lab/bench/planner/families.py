"""Draw synthetic expert loads: model and cluster shapes, load families, drifting windows.

The families cover what recordings show: near-uniform routing, power laws of growing skew, lognormal
loads (the closest to real traces), one hot expert, hot groups (neighbouring experts hot together,
the bad case for contiguous blocks), and two classes of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKENS_PER_LAYER = 2_000_000


@dataclass(frozen=True)
class Shape:
    """Describe a model on a cluster.

    Attributes:
        name: model and ranks.
        layers: MoE layers.
        experts: logical experts per layer.
        ranks: with equal slots.
        slots: per layer.
        groups: of experts; 1 unless the plan is hierarchical.
        nodes: 1 unless the plan is hierarchical.
    """

    name: str
    layers: int
    experts: int
    ranks: int
    slots: int
    groups: int = 1
    nodes: int = 1

    @property
    def kind(self) -> str:
        """Return the row of the table that the shape counts in."""
        if self.nodes > 1:
            return "hierarchical"
        redundancy = self.slots / self.experts - 1
        return (
            "no redundancy"
            if redundancy == 0
            else "6-12% redundancy"
            if redundancy < 0.15
            else "17-25% redundancy"
        )


SHAPES = (
    Shape("Mixtral-8x7B EP4", 32, 8, 4, 8),
    Shape("DeepSeek-V2-Lite EP8", 26, 64, 8, 64),
    Shape("Qwen3-30B-A3B EP16", 48, 128, 16, 128),
    Shape("gpt-oss-120b EP32", 36, 128, 32, 128),
    Shape("GLM-4.5 EP16", 89, 160, 16, 160),
    Shape("DeepSeek-R1 EP32", 58, 256, 32, 256),
    Shape("Kimi-K2 EP48", 60, 384, 48, 384),
    Shape("DeepSeek-V2-Lite EP8 +8", 26, 64, 8, 72),
    Shape("Qwen3-235B EP16 +16", 94, 128, 16, 144),
    Shape("DeepSeek-R1 EP32 +32", 58, 256, 32, 288),
    Shape("DeepSeek-R1 EP72 +32", 58, 256, 72, 288),
    Shape("Kimi-K2 EP32 +32", 60, 384, 32, 416),
    Shape("Qwen3-Next EP32 +32", 48, 512, 32, 544),
    Shape("DeepSeek-V2-Lite EP8 +16", 26, 64, 8, 80),
    Shape("Qwen3-235B EP16 +32", 94, 128, 16, 160),
    Shape("DeepSeek-R1 EP16 +48", 58, 256, 16, 304),
    Shape("DeepSeek-R1 EP64 +64", 58, 256, 64, 320),
    Shape("DeepSeek-V2 EP32 4 nodes +32", 59, 160, 32, 192, 8, 4),
    Shape("DeepSeek-R1 EP32 4 nodes", 58, 256, 32, 256, 8, 4),
    Shape("DeepSeek-R1 EP32 4 nodes +32", 58, 256, 32, 288, 8, 4),
)

FAMILIES = (
    "uniform",
    "zipf 0.5",
    "zipf 0.8",
    "zipf 1.2",
    "lognormal",
    "one hot",
    "hot groups",
    "bimodal",
)


def popularity(family: str, layers: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the probability of each expert, float64 ``[layers, experts]``; each row sums to 1.

    Raises:
        ValueError: for a name that is not in `FAMILIES`.
    """
    if family == "uniform":
        p = np.ones((layers, experts))
    elif family.startswith("zipf "):
        base = np.arange(1, experts + 1) ** -float(family.split()[1])
        p = rng.permuted(np.broadcast_to(base, (layers, experts)).copy(), axis=1)
    elif family == "lognormal":
        p = rng.lognormal(0.0, 0.7, (layers, experts))
    elif family == "one hot":
        p = rng.lognormal(0.0, 0.3, (layers, experts))
        p[np.arange(layers), rng.integers(experts, size=layers)] = 0.05 * p.sum(axis=1)
    elif family == "hot groups":
        groups = max(2, experts // 32) if experts >= 16 else 2
        heat = rng.lognormal(0.0, 0.5, (layers, groups)).repeat(-(-experts // groups), axis=1)[
            :, :experts
        ]
        p = heat * rng.lognormal(0.0, 0.5, (layers, experts))
    elif family == "bimodal":
        p = np.where(rng.random((layers, experts)) < 0.2, 4.0, 0.7) * rng.lognormal(
            0.0, 0.15, (layers, experts)
        )
    else:
        raise ValueError(f"unknown load family {family!r}: one of {', '.join(FAMILIES)}")
    return p / p.sum(axis=1, keepdims=True)


def counts(p: np.ndarray, rng: np.random.Generator, tokens: int = TOKENS_PER_LAYER) -> np.ndarray:
    """Draw the token counts of one window, int64 [layers, experts].

    Args:
        p: float64 [layers, experts], probability of each expert.
        rng: what draws.
        tokens: of every layer.
    """
    return rng.multinomial(tokens, p).astype(np.int64)


def drift(p: np.ndarray, rng: np.random.Generator, amount: float = 0.15) -> np.ndarray:
    """Let every expert's popularity wander by a lognormal step; return that one window later.

    Args:
        p: float64 [layers, experts], probability of each expert.
        rng: what draws.
        amount: size of the step.
    """
    p = p * rng.lognormal(0.0, amount, p.shape)
    return p / p.sum(axis=1, keepdims=True)


def windows(
    family: str,
    shape: Shape,
    num_windows: int,
    seed: int,
    layers: int | None = None,
    amount: float = 0.15,
) -> np.ndarray:
    """Draw drifting token counts; equal for equal arguments.

    Args:
        family: one of `FAMILIES`.
        shape: of the model and the cluster.
        num_windows: how many.
        seed: of what draws.
        layers: fewer than the model's; all when left out.
        amount: size of the drift from window to window.

    Returns:
        int64 [windows, layers, experts].
    """
    rng = np.random.default_rng(
        [seed, FAMILIES.index(family), shape.experts, shape.ranks, shape.slots]
    )
    p = popularity(family, layers or shape.layers, shape.experts, rng)
    result = []
    for _ in range(num_windows):
        result.append(counts(p, rng))
        p = drift(p, rng, amount)
    return np.stack(result)
