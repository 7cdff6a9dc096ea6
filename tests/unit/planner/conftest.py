"""Help the planner's tests."""

from __future__ import annotations

import numpy as np
import pytest

from moe_placement_plugin.formats.load_file import read_load

from ...support.recordings import R1


@pytest.fixture(scope="session")
def traces() -> dict[str, np.ndarray]:
    """Read the recorded DeepSeek-R1 loads by workload, int64 [58, 256]."""
    return {f.stem: read_load(f).total for f in sorted(R1.glob("*.safetensors"))}


def check_valid(table: np.ndarray, slots_per_rank, num_experts: int) -> None:
    """Check that every expert has a slot in every layer, and that no rank holds one twice."""
    start = np.concatenate([[0], np.cumsum(slots_per_rank)])
    assert table.shape[1] == start[-1]
    for row in table:
        assert set(row.tolist()) == set(range(num_experts))
        for a, b in zip(start, start[1:]):
            held = row[a:b].tolist()
            assert len(set(held)) == len(held)


def rank_times(load, table, slots_per_rank, speed=None) -> np.ndarray:
    """Return float64 [layers, ranks], independently of the planner's own evaluation."""
    start = np.concatenate([[0], np.cumsum(slots_per_rank)])
    speed = np.ones(len(slots_per_rank)) if speed is None else np.asarray(speed)
    result = []
    for w, row in zip(np.asarray(load, dtype=np.float64), table):
        share = w / np.bincount(row, minlength=w.size)
        result.append([share[row[a:b]].sum() for a, b in zip(start, start[1:])])
    return np.array(result) / speed


def balance(load, table, slots_per_rank, speed=None) -> float:
    """Return the sum of mean over that of largest times; ranks without slots do not count."""
    times = rank_times(load, table, slots_per_rank, speed)
    speed = np.ones(len(slots_per_rank)) if speed is None else np.asarray(speed)
    total_speed = speed[np.asarray(slots_per_rank) > 0].sum()
    return float(np.asarray(load).sum() / total_speed / times.max(axis=1).sum())
