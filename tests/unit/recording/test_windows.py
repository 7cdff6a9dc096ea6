"""Windows of time: cut alike in all processes, merged when they are too many, joined by layer."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, PlacementError
from moe_placement_plugin.core import events
from moe_placement_plugin.recording.windows import MAX_WINDOWS, Windows, spread_rows


def windows(layers=(0, 1), length: float = 10.0) -> Windows:
    return Windows(layers, 3, length, {"model": "tiny"})


def ones(layers: int = 2) -> np.ndarray:
    return np.ones((layers, 3), dtype=np.int64)


def test_windows_begin_at_multiples_of_their_length(monkeypatch):
    monkeypatch.setattr(events, "_counts", {"rebalances": 2})
    made = windows()
    for when, phase in ((1009.9, "decode"), (1010, "decode"), (1019, "decode"), (1011, "prefill")):
        made.add(when, phase, ones())
    load = made.load()
    assert load.phases == ("decode", "decode", "prefill")
    assert load.counts[:, 0, 0].tolist() == [1, 2, 1]
    assert load.metadata["window_start"] == [1000, 1010, 1010]
    assert load.metadata["events"] == {"rebalances": 2} and load.metadata["model"] == "tiny"


def test_neighbours_are_merged_until_few_enough_are_left():
    made = windows(length=1)
    for second in range(5 * MAX_WINDOWS):
        made.add(second, "decode", ones())
    load = made.load()
    assert made.length == load.metadata["window_seconds"] == 8
    assert load.num_windows == 40 and (load.total == 5 * MAX_WINDOWS).all()


def test_another_process_has_other_layers():
    mine, theirs = windows((0, 2)), windows((1, 2), length=20)
    mine.add(1000, "decode", ones())
    theirs.add(1000, "decode", 10 * ones())
    mine.add_pairs(np.ones((2, 3, 3), dtype=np.int64))
    theirs.add_pairs(np.ones((2, 3, 3), dtype=np.int64))
    mine.merge(theirs.load())
    load = mine.load()
    assert load.layer_ids == (0, 1, 2) and mine.length == 20
    assert load.total[:, 0].tolist() == [1, 10, 11]
    assert load.coactivation[:, 0, 1].tolist() == [1, 1, 2]


def test_what_no_recorder_of_this_model_wrote_is_refused():
    foreign = ExpertLoad(ones()[None])
    with pytest.raises(PlacementError, match="another model or by another tool"):
        windows().merge(foreign)
    other = Windows((0, 1), 4, 10.0, {})
    other.add(0, "decode", np.ones((2, 4)))
    with pytest.raises(PlacementError, match="another model"):
        windows().merge(other.load())


def test_a_recording_without_a_token_is_none():
    made = windows()
    made.add(1000, "decode", 0 * ones())
    with pytest.raises(PlacementError, match="the recording is empty"):
        made.load()


def test_rows_are_spread_among_others():
    rows = np.array([[1, 2], [3, 4]])
    assert spread_rows(rows, [2, 0], 3).tolist() == [[3, 4], [0, 0], [1, 2]]
    assert spread_rows(rows, [0, 1], 2) is rows
