"""Bare tables: their inverse, the next expert to copy, and how lists and errors are shown."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_placement_plugin.core.errors import first_line
from moe_placement_plugin.core.tables import inverse_maps, least_copied, shorten

from ..strategies.strategies_for_tests import placements


@given(placements(), st.integers(0, 99))
def test_the_inverse_names_the_usable_slots_of_each_expert(placement, seed):
    table = placement.physical_to_logical
    usable = np.random.default_rng(seed).random(table.shape) < 0.7
    slots_of, counts = inverse_maps(table, placement.num_logical_experts, usable)
    assert slots_of.shape == (*counts.shape, counts.max())
    for layer in range(len(table)):
        for expert in range(placement.num_logical_experts):
            expected = np.flatnonzero((table[layer] == expert) & usable[layer]).tolist()
            count = counts[layer, expert]
            assert slots_of[layer, expert, :count].tolist() == expected
            assert (slots_of[layer, expert, count:] == -1).all()


def test_one_rule_for_all_layers_about_usable_slots():
    slots_of, counts = inverse_maps(np.array([[0, 1, 0]]), 2, np.array([True, True, False]))
    assert slots_of.tolist() == [[[0], [1]]] and counts.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "copies, held, expert", [([1, 1, 1], [], 0), ([1, 1, 1], [0], 1), ([2, 2, 1], [0], 2)]
)
def test_the_expert_with_the_fewest_copies_is_copied_next(copies, held, expert):
    assert least_copied(np.array(copies), held) == expert


def test_long_lists_are_shortened():
    assert shorten(range(3)) == "[0, 1, 2]"
    assert shorten(range(20), 2) == "[0, 1, ...]"


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError("\n  one \n"), "one"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_are_shown_by_their_first_line(error, line):
    assert first_line(error) == line
