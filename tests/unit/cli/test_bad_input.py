"""Test every bad input: one line on stderr that names the file, exit code 2.

Nothing is written.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_placement_plugin.formats.load_file import read_load
from moe_placement_plugin.formats.plan_or_load import write
from tests.support.loads import skewed


def refused(done, *words: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("moe-placement: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert done.stdout == ""


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "out" / "plan.json"
    path.parent.mkdir()
    yield path
    assert list(path.parent.iterdir()) == [], "something was written"


def plan(cli, output, *loads, ranks=4, more=()):
    return cli("plan", *loads, "--ranks", ranks, "-o", output, *more, code=None)


def test_truncated_recording(cli, output, load_file):
    load_file.write_bytes(load_file.read_bytes()[:-40])
    refused(plan(cli, output, load_file), str(load_file), "no recorded load")


def test_truncated_header(cli, output, load_file):
    load_file.write_bytes(load_file.read_bytes()[:20])
    refused(plan(cli, output, load_file), str(load_file))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a load", b"\x00\x01\x02" * 50, b"[1, 2", b'{"a": 1}', b"PK\x03\x04nonsense"],
)
def test_foreign_file(cli, output, tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    refused(plan(cli, output, path), str(path))


def test_foreign_safetensors(cli, output, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path)
    refused(plan(cli, output, path), str(path), "no recorded load")


def test_missing_file(cli, output, tmp_path):
    refused(plan(cli, output, tmp_path / "gone.json"), "gone.json", "does not exist")


def test_windows_of_unequal_shape(cli, output, tmp_path):
    path = tmp_path / "ragged.json"
    path.write_text(json.dumps({"logical_count": [[[1, 2], [3, 4]], [[1, 2]]]}))
    refused(plan(cli, output, path), str(path), "rows of different lengths")


def test_negative_count(cli, output, tmp_path):
    path = tmp_path / "negative.json"
    path.write_text(json.dumps({"logical_count": [[1, -2], [3, 4]]}))
    refused(plan(cli, output, path, ranks=2), str(path), "negative")


def test_empty_recording(cli, output, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"logical_count": [[0, 0], [0, 0]]}))
    refused(plan(cli, output, path, ranks=2), str(path), "empty")


def test_loads_of_two_models(cli, output, load_file, tmp_path):
    other = tmp_path / "other.safetensors"
    write(skewed(experts=8), other)
    refused(plan(cli, output, load_file, other), "one model")


def test_phase_that_was_not_recorded(cli, output, load_file):
    refused(
        plan(cli, output, load_file, more=("--phase", "decode")),
        str(load_file),
        "no window of phase decode",
    )


def test_unknown_strategy(cli, output, load_file):
    refused(plan(cli, output, load_file, more=("--strategy", "best")), "'best'", "zigzag")


def test_ranks_on_nodes(cli, output, load_file):
    refused(plan(cli, output, load_file, more=("--nodes", "3")), "4 ranks on 3 nodes")


def test_a_plan_is_no_load(cli, output, load_file, tmp_path):
    made = tmp_path / "made.json"
    cli("plan", load_file, "--ranks", 4, "-o", made)
    refused(plan(cli, output, made), str(made), "is a plan")


def test_directory_that_does_not_exist(cli, load_file, tmp_path):
    refused(plan(cli, tmp_path / "nowhere" / "plan.json", load_file), "nowhere")
    refused(
        cli("show", load_file, "--html", tmp_path / "nowhere" / "page.html", code=None), "nowhere"
    )
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(
    not os.path.isdir("/proc/self"),
    reason="needs a directory that nobody, root included, can write to",
)
@pytest.mark.parametrize("verb", ["plan", "show", "export"])
def test_directory_that_cannot_be_written(cli, load_file, verb):
    target = "/proc/self/out"  # a directory in which even root cannot make files
    arguments = {
        "plan": ("--ranks", 4, "-o", target),
        "show": ("--html", target),
        "export": ("-o", target),
    }[verb]
    refused(cli(verb, load_file, *arguments, code=None), target, "cannot be written")


def test_plan_for_other_ranks(cli, load_file, tmp_path):
    made = tmp_path / "made.json"
    cli("plan", load_file, "--ranks", 4, "-o", made)
    refused(
        cli("simulate", load_file, "--ranks", 8, "--plan", made, code=None), str(made), "4 EP ranks"
    )
    other = tmp_path / "other.json"
    cli("plan", load_file, "--ranks", 8, "-o", other)
    refused(cli("diff", made, other, code=None), "4 and 8 EP ranks")


def test_plan_for_another_model(cli, load_file, tmp_path):
    other_load, other = tmp_path / "b.safetensors", tmp_path / "b.json"
    write(skewed(experts=8), other_load)
    cli("plan", other_load, "--ranks", 4, "-o", other)
    refused(cli("show", load_file, other, code=None), "8 experts", "different models")


def test_calibration(cli, load_file, tmp_path):
    refused(
        cli("simulate", load_file, "--ranks", 4, "--calibration", "h900", code=None),
        "h900",
        "bench layer",
    )
    path = tmp_path / "calibration.json"
    path.write_text(
        '{"format": "moe-layer-calibration", "version": 1, "device": "x", "layer": {}, '
        '"measurements": [{"tokens": 1}]}'
    )
    refused(
        cli("simulate", load_file, "--ranks", 4, "--calibration", path, code=None),
        str(path),
        "measurements.0.",
    )


def test_layer_without_coactivation(cli, load_file, tmp_path):
    page = tmp_path / "page.html"
    refused(cli("show", load_file, "--layer", 1, "--html", page, code=None), "co-activation")
    refused(cli("show", load_file, "--layer", 99, "--html", page, code=None), "99")
    assert not page.exists()


def test_sglang_plan_without_ranks(cli, tmp_path):
    path = tmp_path / "sglang.json"
    path.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3]]}))
    refused(cli("show", path, code=None), str(path), "--ranks")
    cli("show", path, "--ranks", 2)


def test_old_file_survives_a_failed_write(cli, load_file, tmp_path):
    made = tmp_path / "made.json"
    cli("plan", load_file, "--ranks", 4, "-o", made)
    before = made.read_bytes()
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    refused(plan(cli, made, bad), str(bad))
    assert made.read_bytes() == before


def test_coactivation_of_wrong_shape(cli, output, tmp_path):
    path = tmp_path / "pairs.safetensors"
    header = {
        "format": "moe-expert-load",
        "version": "1",
        "layer_ids": "[0]",
        "phases": '["mixed"]',
        "metadata": "{}",
    }
    save_file(
        {"counts": np.ones((1, 1, 4), np.int64), "coactivation": np.ones((1, 2, 2), np.int64)},
        path,
        metadata=header,
    )
    with pytest.raises(ValueError):
        read_load(path)
    refused(plan(cli, output, path, ranks=2), str(path), "coactivation")
