import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_placement_plugin import ExpertLoad, PlacementError
from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_or_load import write

COUNTS = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=st.integers(0, 10**12)
)


@given(COUNTS)
def test_safetensors_round_trip(counts):
    import tempfile
    from pathlib import Path

    windows, layers, experts = counts.shape
    pairs = np.ones((layers, experts, experts), dtype=np.int64)
    load = ExpertLoad(
        counts,
        layer_ids=tuple(range(3, 3 + layers)),
        phases=("decode",) * windows,
        coactivation=pairs,
        metadata={"model": "m"},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "load.safetensors"
        write(load, path)
        back = read_load(path)
    np.testing.assert_array_equal(back.counts, counts)
    np.testing.assert_array_equal(back.coactivation, pairs)
    assert (back.layer_ids, back.phases, back.metadata) == (
        load.layer_ids,
        load.phases,
        {"model": "m"},
    )


def test_sglang_json_with_dense_layers(tmp_path):
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"logical_count": [[0, 0], [1, 2], [3, 0]]}))
    load = read_load(path)
    assert load.counts.shape == (1, 3, 2)
    moe = load.moe_layers()
    assert moe.layer_ids == (1, 2)
    np.testing.assert_array_equal(moe.total, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(load.select_layers((1, 2)).total, moe.total)


def test_sglang_torch_dump(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pt files needs torch")
    path = tmp_path / "load.pt"
    torch.save({"logical_count": torch.arange(12).reshape(2, 2, 3), "rank": 0}, path)
    load = read_load(path)
    np.testing.assert_array_equal(load.counts, np.arange(12).reshape(2, 2, 3))
    torch.save({"something": 1}, path)
    with pytest.raises(PlacementError, match="no logical_count"):
        read_load(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PlacementError, match="no readable .pt"):
        read_load(path)


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pt files needs torch")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / "evil.pt"
    torch.save({"logical_count": Evil()}, path)
    with pytest.raises(PlacementError, match="evil.pt"):
        read_load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "counts, message",
    [
        ([[1.0, float("nan")]], r"counts\[0, 1\] is nan"),
        ([[1.0, float("inf")]], "is inf"),
        ([[1, -2]], r"counts\[0, 1\] is -2: token counts must be finite and not negative"),
        ([[1], [1, 2]], "rows of different lengths"),
        ([1, 2], r"shape \(2,\)"),
        ([[]], r"not empty"),
        ([["a"]], "token counts are numbers"),
        ([[True]], "token counts are numbers"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(PlacementError, match=message):
        ExpertLoad(counts)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no recorded load"),
        (b"{}", "neither a plan nor a recorded load"),
        (b'{"logical_count": [[1, 2', "is not JSON"),
        (b"\x10\0\0\0\0\0\0\0{}", "no recorded load"),
        (pickle.dumps({"logical_count": [[1]]}), "no recorded load"),
    ],
)
def test_foreign_and_truncated_files(tmp_path, content, message):
    path = tmp_path / "load"
    path.write_bytes(content)
    with pytest.raises(PlacementError, match=message) as error:
        read_load(path)
    assert str(path) in str(error.value)


def test_a_truncated_recording_is_refused(tmp_path):
    path = tmp_path / "load.safetensors"
    write(ExpertLoad(np.ones((2, 3, 4), dtype=np.int64)), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PlacementError, match="no recorded load"):
        read_load(path)


def test_layers_of_another_model_are_refused():
    load = ExpertLoad(np.ones((1, 3, 4)))
    assert load.select_layers((5, 6, 7)).layer_ids == (5, 6, 7)
    with pytest.raises(PlacementError, match="the load has 3 layers, the model has 2 MoE layers"):
        ExpertLoad(np.ones((1, 3, 4)), (4, 5, 6)).select_layers((1, 2))
    with pytest.raises(PlacementError, match="empty"):
        ExpertLoad(np.zeros((1, 3, 4))).moe_layers()


def test_concatenate():
    a = ExpertLoad(np.ones((1, 2, 3)), phases=("prefill",))
    b = ExpertLoad(np.zeros((2, 2, 3)), phases=("decode", "mixed"))
    both = ExpertLoad.concatenate([a, b])
    assert both.num_windows == 3 and both.phases == ("prefill", "decode", "mixed")
    with pytest.raises(PlacementError, match="must be of one model"):
        ExpertLoad.concatenate([a, ExpertLoad(np.ones((1, 2, 4)))])
