"""Check that what is shipped under examples/ is what its pages say."""

import runpy

import numpy as np
import pytest

from moe_placement_plugin.formats.load_file import read_load

from ..support.recordings import R1, routed_tokens


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("in1k_out1k", 1071078), ("in1k_out8k", 1025878), ("in8k_out1k", 8393859)],
)
def test_recordings_of_r1_are_whole_and_say_where_they_are_from(name, tokens):
    load = read_load(R1 / f"{name}.safetensors")
    assert load.layer_ids == tuple(range(3, 61)) and load.num_experts == 256
    assert (load.counts.sum(axis=2) == 8 * tokens).all() and load.counts.max() <= tokens
    assert load.metadata["licence"].startswith("Apache-2.0")
    assert "NVIDIA/srt-slurm" in load.metadata["source"]


def test_recordings_stay_small():
    files = list(R1.iterdir())
    assert len(files) == 5 and sum(f.stat().st_size for f in files) <= 300_000


def test_recordings_are_made_from_published_files(tmp_path):
    """The script keeps every count, leaves out dense layers and writes what `ExpertLoad` reads."""
    torch = pytest.importorskip("torch", reason="recordings are published in torch's format")
    counts = np.arange(12).reshape(3, 4)
    counts[0] = 0
    torch.save({"logical_count": torch.from_numpy(counts)}, tmp_path / "stat.pt")
    convert = runpy.run_path(str(R1 / "convert.py"))["main"]
    convert(str(tmp_path / "stat.pt"), str(tmp_path / "load.safetensors"))
    load = read_load(tmp_path / "load.safetensors")
    assert load.layer_ids == (1, 2) and (load.total == counts[1:]).all()
    assert load.metadata["source"].endswith("stat.pt")


def test_tokens_of_tests_choose_distinct_experts_that_go_together():
    ids = routed_tokens(layers=2, tokens=500)
    assert ids.shape == (2, 500, 6)
    assert all(len(set(token)) == 6 for token in ids[0].tolist())
    chosen = np.zeros((500, 64))
    np.put_along_axis(chosen, ids[0], 1, axis=1)
    share, together = chosen.mean(axis=0), chosen.T @ chosen / 500
    apart = np.outer(share, share)
    off_diagonal = ~np.eye(64, dtype=bool)
    assert (np.abs(together - apart)[off_diagonal]).sum() > 0.5 * apart[off_diagonal].sum()
