"""Tuned configurations for ranks with redundant experts, looked up as the engines do."""

from __future__ import annotations

import functools
import logging

import pytest

from moe_placement_plugin.engines.common.kernel_configs import ConfigsOfFewer


class Engine:
    """Look up as SGLang does.

    For the second product it falls back to the first one's, through the module's global.
    """

    def __init__(self, files: dict[tuple[int, bool], dict], redundant: int):
        self.files, self.asked = files, []
        ours = ConfigsOfFewer(lambda: redundant)

        @functools.lru_cache
        def original(E, N, dtype, down_moe=False):
            self.asked.append((E, down_moe))
            if (E, down_moe) in files:
                return files[E, down_moe]
            return self.get(E, N, dtype, down_moe=False) if down_moe else None

        self.get = functools.wraps(original)(
            lambda *args, **kwargs: ours(original, *args, **kwargs)
        )


def test_the_configuration_without_redundant_experts_is_used_once_it_is_missed(caplog):
    engine = Engine({(64, False): {1: "tuned"}}, redundant=4)
    with caplog.at_level(logging.INFO, "moe_placement_plugin"):
        assert engine.get(68, 768, None) == engine.get(68, 768, None) == {1: "tuned"}
    assert engine.asked == [(68, False), (64, False)], "each is looked up once"
    assert [r.getMessage() for r in caplog.records] == [
        "moe_placement_plugin: the MoE kernel is tuned for 64 experts per rank, not for the 68 "
        "with redundant ones: that configuration is used"
    ]


def test_keywords_are_heeded():
    engine = Engine({(64, False): {1: "tuned"}}, redundant=4)
    assert engine.get(E=68, N=768, dtype=None) == {1: "tuned"}


def test_the_second_product_gets_its_own_configuration_before_the_first_ones():
    both = Engine({(64, False): {1: "up"}, (64, True): {1: "down"}}, redundant=4)
    assert both.get(68, 768, None, down_moe=True) == {1: "down"}
    up = Engine({(64, False): {1: "up"}}, redundant=4)
    assert up.get(68, 768, None, down_moe=True) == {1: "up"}


@pytest.mark.parametrize(
    "files, redundant, experts, expected",
    [
        ({(68, False): {1: "own"}, (64, False): {1: "other"}}, 4, 68, {1: "own"}),
        ({(64, False): {1: "other"}}, 0, 68, None),
        ({(60, False): {1: "other"}}, 4, 68, None),
        ({(0, False): {1: "other"}}, 4, 4, None),
    ],
)
def test_what_is_tuned_or_has_no_redundant_experts_stays(files, redundant, experts, expected):
    assert Engine(files, redundant).get(experts, 768, None) == expected


def test_an_error_of_the_engine_does_not_stick():
    def original(E):
        if E == 68:
            raise OSError("no folder")
        return {E: "tuned"}

    ours = ConfigsOfFewer(lambda: 4)
    with pytest.raises(OSError):
        ours(original, 68)
    assert ours(original, 64) == {64: "tuned"}
