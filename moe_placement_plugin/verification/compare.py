"""Decide whether replicas agree and every slot holds the expert that it should; numpy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..core.errors import PlacementError


@dataclass(frozen=True, eq=False)
class LayerDigests:
    """Hold the digests of one rank's slots of one layer.

    Attributes:
        experts: logical expert of each slot, int32 ``[slots]``; -1 for a slot that holds none.
        names: names of the tensors.
        values: uint64 ``[slots, tensors]``.
    """

    experts: np.ndarray
    names: tuple[str, ...]
    values: np.ndarray


RankDigests = dict[int, LayerDigests]
"""Layer id -> digests of one rank's slots."""

ExpertDigests = dict[int, tuple[tuple[str, ...], dict[int, np.ndarray]]]
"""Layer id -> (tensor names, logical expert -> uint64 ``[tensors]``)."""


class WeightsMismatch(PlacementError):
    """Say that weights are not where the placement says.

    Attributes:
        differences: a sentence for each.
    """

    def __init__(self, what: str, differences: list[str], mend: str):
        self.differences = differences
        shown = "; ".join(differences[:4]) + (
            f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
        )
        super().__init__(f"{what}: {shown}. {mend}")


def expert_digests(ranks: Iterable[RankDigests]) -> ExpertDigests:
    """Take the digest of every logical expert from the first rank and slot that holds it.

    Args:
        ranks: digests of every EP rank, in their order.
    """
    digests: ExpertDigests = {}
    for rank in ranks:
        for layer_id, layer in rank.items():
            _, experts = digests.setdefault(layer_id, (layer.names, {}))
            for expert, value in zip(layer.experts.tolist(), layer.values):
                if expert >= 0:
                    experts.setdefault(expert, value)
    return digests


def check_replicas(ranks: list[RankDigests], num_experts: int | Mapping[int, int]) -> None:
    """Check that every expert is somewhere, and that all its replicas hold the same bits.

    Args:
        ranks: digests of every EP rank, in their order.
        num_experts: logical experts, of every layer or by layer id; a fused shared expert counts
            from there on.

    Raises:
        WeightsMismatch: naming layers, slots, experts and ranks.
    """
    differences = []
    first: dict[tuple[int, int], tuple[str, tuple[str, ...], np.ndarray]] = {}
    for rank, layers in enumerate(ranks):
        for layer_id, layer in layers.items():
            for slot, expert in enumerate(layer.experts.tolist()):
                if expert < 0:
                    continue
                here = f"slot {slot} of rank {rank}"
                there, names, values = first.setdefault(
                    (layer_id, expert), (here, layer.names, layer.values[slot])
                )
                if names != layer.names:
                    differences.append(
                        f"layer {layer_id}: {here} has tensors {layer.names}, {there} has {names}"
                    )
                elif not np.array_equal(values, layer.values[slot]):
                    wrong = _names(names, values != layer.values[slot])
                    differences.append(
                        f"layer {layer_id}, expert {expert}: {here} and {there} differ in {wrong}"
                    )
    for layer_id in sorted({layer for rank in ranks for layer in rank}):
        experts = num_experts if isinstance(num_experts, int) else num_experts[layer_id]
        absent = [expert for expert in range(experts) if (layer_id, expert) not in first]
        if absent:
            differences.append(f"layer {layer_id}: no rank holds expert {_list(absent)}")
    if differences:
        raise WeightsMismatch(
            "replicas of an expert differ",
            differences,
            "The server stops, since answers would depend on which replica is chosen",
        )


def check_experts(
    expected: ExpertDigests, ranks: list[RankDigests], what: str, mend: str, first_rank: int = 0
) -> None:
    """Check that every slot holds the bits that its expert had.

    Args:
        expected: digest of every expert, from before an exchange or from a clean load.
        ranks: digests of every EP rank now, in their order.
        what: beginning of the message, such as "weights changed in an exchange".
        mend: end of the message.
        first_rank: number of the first rank; a rank can check itself alone, since it knows every
            expert's digest.

    Raises:
        WeightsMismatch: naming layers, slots, experts, ranks and, where another expert's weights
            are found, which.
    """
    differences = []
    for rank, layers in enumerate(ranks, first_rank):
        for layer_id, layer in layers.items():
            if layer_id not in expected:
                differences.append(f"layer {layer_id} is new")
                continue
            names, experts = expected[layer_id]
            if names != layer.names:
                differences.append(
                    f"layer {layer_id}, rank {rank}: tensors {layer.names}, expected {names}"
                )
                continue
            whose = {value.tobytes(): expert for expert, value in experts.items()}
            for slot, expert in enumerate(layer.experts.tolist()):
                if expert < 0:
                    continue
                here = f"layer {layer_id}, slot {slot} of rank {rank}"
                if expert not in experts:
                    differences.append(f"{here}: expert {expert} is not known")
                elif not np.array_equal(experts[expert], layer.values[slot]):
                    other = whose.get(layer.values[slot].tobytes())
                    content = "something else" if other is None else f"expert {other}"
                    wrong = _names(names, experts[expert] != layer.values[slot])
                    differences.append(
                        f"{here} should hold expert {expert}: it differs in {wrong}, which hold "
                        f"{content}"
                    )
    missing = sorted(set(expected) - {layer for rank in ranks for layer in rank})
    if missing:
        differences.append(f"layer {_list(missing)} is gone")
    if differences:
        raise WeightsMismatch(what, differences, mend)


def find_identical_experts(experts: ExpertDigests) -> list[str]:
    """Find different experts with equal weights.

    An upcycled model has such by right; else they are the mark of a loader gone wrong.

    Returns:
        A sentence for each layer that has some.
    """
    sentences = []
    for layer_id, (_, digests) in sorted(experts.items()):
        groups: dict[bytes, list[int]] = {}
        for expert, value in sorted(digests.items()):
            groups.setdefault(value.tobytes(), []).append(expert)
        same = [group for group in groups.values() if len(group) > 1]
        if same:
            sentences.append(f"layer {layer_id}: experts {_list(same[0])} are the same")
    return sentences


def _names(names: tuple[str, ...], differs: np.ndarray) -> str:
    return ", ".join(name for name, wrong in zip(names, differs) if wrong)


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values[:6])) + (
        f" and {len(values) - 6} more" if len(values) > 6 else ""
    )
