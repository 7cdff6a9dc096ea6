"""What is said when digests differ."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin.verification.compare import (
    LayerDigests,
    WeightsMismatch,
    check_experts,
    check_replicas,
    expert_digests,
    find_identical_experts,
)
from moe_placement_plugin.verification.level import check_level

NAMES = ("w13_weight", "w2_weight")


def digests(*experts, changed=()):
    """Make a rank's layer 4: expert e has digests (10 e, 10 e + 1), changed ones differ in w2."""
    values = np.array(
        [(10 * abs(e), 10 * abs(e) + 1 + (e in changed)) for e in experts], dtype=np.uint64
    ).reshape(-1, 2)
    return {4: LayerDigests(np.array(experts, dtype=np.int32), NAMES, values)}


def test_equal_replicas_pass_and_give_every_expert():
    ranks = [digests(0, 1), digests(2, 0), digests(-1)]
    check_replicas(ranks, 3)
    names, experts = expert_digests(ranks)[4]
    assert names == NAMES and {e: v.tolist() for e, v in experts.items()} == {
        0: [0, 1],
        1: [10, 11],
        2: [20, 21],
    }


def test_replicas_that_differ_are_named():
    with pytest.raises(
        WeightsMismatch,
        match="layer 4, expert 1: slot 1 of rank 1 and slot 1 of rank 0 differ in w2_weight",
    ):
        check_replicas([digests(0, 1), digests(2, 1, changed=(1,))], 3)


def test_an_expert_that_nobody_holds_is_named():
    with pytest.raises(WeightsMismatch, match="layer 4: no rank holds expert 1, 3"):
        check_replicas([digests(0), digests(2)], 4)


def test_replicas_with_other_tensors_are_named():
    other = {
        4: LayerDigests(
            np.array([0], dtype=np.int32), ("w13_weight",), np.zeros((1, 1), dtype=np.uint64)
        )
    }
    with pytest.raises(
        WeightsMismatch,
        match=r"slot 0 of rank 1 has tensors \('w13_weight',\), slot 0 of rank 0 has",
    ):
        check_replicas([digests(0), other], 1)


def test_after_an_exchange_every_slot_is_compared():
    before = expert_digests([digests(0, 1), digests(2, 3)])
    check_experts(before, [digests(3, 2), digests(1, 0)], "what", "mend")
    wrong = digests(3, 2)
    wrong[4].values[1] = digests(0)[4].values[0]
    with pytest.raises(WeightsMismatch) as caught:
        check_experts(before, [wrong, digests(1, 0, changed=(0,))], "what", "mend")
    assert caught.value.differences == [
        "layer 4, slot 1 of rank 0 should hold expert 2: it differs in w13_weight, w2_weight, "
        "which hold expert 0",
        "layer 4, slot 1 of rank 1 should hold expert 0: it differs in w2_weight, which hold "
        "something else",
    ]
    assert str(caught.value).startswith("what: layer 4") and str(caught.value).endswith(". mend")


def test_layers_that_come_or_go_and_unknown_experts_are_named():
    before = expert_digests([digests(0, 1)])
    with pytest.raises(WeightsMismatch, match="layer 5 is new; layer 4 is gone"):
        check_experts(before, [{5: digests(0)[4]}], "what", "mend")
    with pytest.raises(WeightsMismatch, match="expert 7 is not known"):
        check_experts(before, [digests(0, 1, 7)], "what", "mend")


def test_many_differences_are_counted():
    with pytest.raises(WeightsMismatch, match="and 6 more"):
        check_replicas([digests(*range(10)), digests(*range(10), changed=range(10))], 10)


def test_equal_experts_are_remarked_on():
    same = digests(0, 1, 2)
    same[4].values[2] = same[4].values[0]
    assert find_identical_experts(expert_digests([same])) == ["layer 4: experts 0, 2 are the same"]
    assert find_identical_experts(expert_digests([digests(0, 1)])) == []


@pytest.mark.parametrize(
    "value, placed, level",
    [
        (None, True, "replicas"),
        (None, False, "off"),
        ("off", True, "off"),
        ("checkpoint", False, "checkpoint"),
    ],
)
def test_levels(value, placed, level):
    assert check_level(value, placed) == level


def test_an_unknown_level_is_refused():
    with pytest.raises(
        Exception, match="--expert-placement-verify full: expected one of off, replicas, checkpoint"
    ):
        check_level("full", True)


def test_layers_may_have_different_numbers_of_experts():
    ranks = [{1: digests(0, 1, 2)[4], 2: digests(0)[4]}]
    check_replicas(ranks, {1: 3, 2: 1})
    with pytest.raises(WeightsMismatch, match="layer 2: no rank holds expert 1, 2"):
        check_replicas(ranks, 3)


def test_a_rank_checks_itself_by_its_own_number():
    before = expert_digests([digests(0, 1), digests(2, 3)])
    check_experts(before, [digests(3, 0)], "what", "mend", first_rank=1)
    with pytest.raises(WeightsMismatch, match="slot 0 of rank 1 should hold expert 3"):
        check_experts(before, [digests(3, 0, changed=(3,))], "what", "mend", first_rank=1)
