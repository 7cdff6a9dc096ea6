"""Make loads and tokens that tests of several folders use."""

from __future__ import annotations

import numpy as np

from tests.support.paths import EXAMPLES

R1 = EXAMPLES / "deepseek-r1"
"""Recorded loads of DeepSeek-R1, which come with the repository."""


def routed_tokens(
    layers: int, tokens: int, experts: int = 64, top_k: int = 6, topics: int = 8, seed: int = 0
) -> np.ndarray:
    """Make expert choices int64 ``[layers, tokens, top_k]`` in which experts go together.

    Each token has a topic, the same in all layers, and each topic favours other experts in each
    layer; the rest is noise, so that a plan from one half of the tokens says something about the
    other half, and not all.
    """
    rng = np.random.default_rng(seed)
    topic = rng.integers(topics, size=tokens)
    favours = rng.normal(0, 3.0, (layers, topics, experts))
    popularity = rng.normal(0, 0.8, (layers, 1, experts))
    scores = (favours + popularity)[:, topic] + rng.gumbel(size=(layers, tokens, experts))
    return np.argsort(-scores, axis=2)[:, :, :top_k]
