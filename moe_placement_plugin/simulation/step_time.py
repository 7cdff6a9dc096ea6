"""Predict how long a step's MoE layers take, and where balance buys nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.placement import Placement
from .costmodel import LayerCost

SAMPLED_STEPS = 32
"""Steps that `step_time` draws, always the same ones."""


def dead_zone(num_ranks: int) -> float:
    """Return the max/mean rank load below which balance buys nothing at small decode batches.

    There a rank's time follows the weights of its active experts rather than its tokens
    (PB-OEPLB, METRO).
    """
    return 1 + 0.004 * num_ranks**1.5


@dataclass(frozen=True)
class StepTime:
    """Hold the time of the MoE layers in a step of ``tokens`` tokens, over sampled steps.

    Attributes:
        tokens: tokens per step over all ranks.
        layer_us: microseconds of the slowest rank, mean over steps, ``[layers]``.
        ideal_us: the same if tokens and active experts were even over the ranks, ``[layers]``.
    """

    tokens: int
    layer_us: np.ndarray
    ideal_us: np.ndarray

    @property
    def total_us(self) -> float:
        """Return the microseconds of all layers."""
        return float(self.layer_us.sum())


def step_time(
    placement: Placement,
    counts: np.ndarray,
    tokens: int,
    top_k: int,
    cost: LayerCost,
    all_gather: bool = False,
) -> StepTime:
    """Predict the time of the MoE layers in steps of ``tokens`` tokens.

    Steps are drawn from the recorded shares, expert choices independent of each other; the replicas
    of an expert take its tokens in turn. A layer lasts as long as its slowest rank.

    Args:
        placement: rows for the same layers as ``counts``.
        counts: recorded tokens per expert, ``[layers, experts]``.
        tokens: tokens per step over all ranks.
        top_k: experts per token.
        cost: the fitted cost model.
        all_gather: whether every rank gets all tokens, rather than those with a choice there.
    """
    rng = np.random.default_rng(0)
    layers, ranks = placement.num_layers, placement.num_ranks
    layer_us, ideal_us = np.zeros(layers), np.zeros(layers)
    slot_order = _copy_number(placement)
    for layer in range(layers):
        share = (
            counts[layer] / counts[layer].sum()
            if counts[layer].any()
            else np.full(counts.shape[1], 1 / counts.shape[1])
        )
        drawn = rng.multinomial(tokens * top_k, share, size=SAMPLED_STEPS)
        experts = placement.physical_to_logical[layer]
        replicas = placement.replica_counts[layer, experts]
        # Copy c of r takes one token more while tokens mod r > c.
        per_slot = drawn[:, experts] // replicas + (
            drawn[:, experts] % replicas > slot_order[layer]
        )
        per_rank, active, rows = np.zeros((3, SAMPLED_STEPS, ranks))
        used = np.flatnonzero(placement.slots_per_rank)
        starts = placement.rank_offsets[:-1][used]
        per_rank[:, used] = np.add.reduceat(per_slot, starts, axis=1)
        active[:, used] = np.add.reduceat(per_slot > 0, starts, axis=1)
        rows[:, used] = tokens if all_gather else _tokens_on_ranks(per_slot, starts, tokens)
        layer_us[layer] = cost.time(per_rank, active, rows).max(axis=1).mean()
        ideal_us[layer] = cost.time(
            per_rank.mean(axis=1), active.mean(axis=1), rows.mean(axis=1)
        ).mean()
    return StepTime(tokens, layer_us, ideal_us)


def _tokens_on_ranks(per_slot: np.ndarray, starts: np.ndarray, tokens: int) -> np.ndarray:
    """Return the expected tokens with at least one choice on a rank, ``[steps, ranks]``.

    A token chooses as many experts as any other and none twice. So the number of its choices on a
    rank varies as in sampling of a fixed size (Hajek 1964), and it is none of them as often as in
    the binomial distribution of that mean and variance: within 1% of tokens routed at random, and
    1 to 7% of recorded ones, whose experts are chosen together.

    Args:
        per_slot: tokens of each slot, ``[steps, slots]``.
        starts: first slot of each rank that has any.
        tokens: of a step.
    """
    chosen = np.minimum(per_slot / tokens, 1.0)
    mean, free = (np.add.reduceat(x, starts, axis=1) for x in (chosen, chosen * (1 - chosen)))
    total = free.sum(axis=1, keepdims=True)
    variance = free * (1 - np.divide(free, total, out=np.ones_like(free), where=total > 0))
    here = mean > 0
    none = np.ones_like(mean)
    none[here] = (variance[here] / mean[here]) ** (mean[here] ** 2 / (mean[here] - variance[here]))
    return tokens * (1 - none)


def _copy_number(placement: Placement) -> np.ndarray:
    """Return how many slots before each one hold the same expert, int64 ``[layers, slots]``."""
    layers, slots = placement.physical_to_logical.shape
    result = np.zeros((layers, slots), dtype=np.int64)
    table = placement.logical_to_physical
    for copy in range(1, table.shape[2]):
        layer, expert = np.nonzero(table[:, :, copy] >= 0)
        result[layer, table[layer, expert, copy]] = copy
    return result
