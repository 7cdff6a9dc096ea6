"""Test how answers that differ are told."""

from __future__ import annotations

import pytest

from moe_placement_plugin.lab.gpu.serving.answers import difference
from moe_placement_plugin.lab.gpu.serving.report import answers_in_words
from moe_placement_plugin.lab.servers.engines import Completion


def test_answers_that_part_are_told_with_how_near_the_tie_was():
    reference = Completion(
        [1, 2, 3], [-0.1, -0.5, -0.2], [{1: -0.1, 7: -3.0}, {2: -0.5, 9: -0.52}, {3: -0.2, 8: -4.0}]
    )
    same = Completion([1, 2, 3], [-0.1, -0.4, -0.2])
    near = Completion(
        [1, 9, 5], [-0.1, -0.51, -5.0]
    )  # what comes after the first other token continues another text
    wrong = Completion([4, 2, 3], [-0.3, -0.5, -0.2])
    assert difference([same], [reference]) == {
        "different": 0,
        "logprobs": pytest.approx(0.1),
        "median": 0.0,
        "behind": 0.0,
        "first": [],
    }
    found = difference([same, near], [reference, reference])
    assert (found["different"], found["first"][0]["answer"], found["first"][0]["place"]) == (
        1,
        1,
        1,
    )
    assert found["behind"] == pytest.approx(0.02) and found["logprobs"] == pytest.approx(0.1)
    assert (
        answers_in_words(found, 2)
        == "1 of 2 differ where 0.02 behind, logprobs 1.0e-01, half of them 0.0e+00"
    )
    assert difference([wrong], [Completion(wrong.token_ids, [-0.2, -0.4, -0.4])])[
        "median"
    ] == pytest.approx(0.1)
    found = difference([wrong, near], [reference, reference])
    assert found["different"] == 2 and found["behind"] == pytest.approx(2.9), (
        "at least as far behind as the last that is known"
    )
    with pytest.raises(ValueError):
        difference([same], [reference, reference])
