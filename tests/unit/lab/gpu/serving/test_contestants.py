"""Test the servers that are compared: their command lines, and which of them are up together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="checkpoints are made with torch")
pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.lab.gpu import one_gpu  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.__main__ import main  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.contestants import (  # noqa: E402
    CONTESTANTS,
    Setup,
    batches,
    command,
)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("layout", ["tp", "dp"])
def test_command_lines(engine, layout, tmp_path):
    setup = Setup(engine, 4, layout, False, "bfloat16", True, 0.1, 200, 4112, 1 << 30)
    for one in CONTESTANTS.values():
        if one.load:
            with pytest.raises(PlacementError, match="plans from a recorded load"):
                command(one, setup, tmp_path, None, 1)
        line, env = command(one, setup, tmp_path, tmp_path / "load", 1)
        off = env.get("VLLM_PLUGINS" if engine == "vllm" else "SGLANG_PLUGINS")
        assert (
            (off is None) == (one.strategy is not None) == ("--expert-placement-strategy" in line)
        )
        ranks = {
            ("vllm", "tp"): "--tensor-parallel-size",
            ("vllm", "dp"): "--data-parallel-size",
            ("sglang", "tp"): "--tp-size",
            ("sglang", "dp"): "--dp-size",
        }
        assert line[line.index(ranks[engine, layout]) + 1] == "4"
        assert ("--enable-eplb" in line) == (
            bool(one.moving) or engine == "vllm" and bool(one.redundant)
        )


def test_one_gpu_in_place_of_many(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    for kind, ranks in (("shared", 4), ("lone", 1)):
        setup = Setup(
            "sglang", 4, "tp", False, "bfloat16", kind == "lone", 0.1, 200, 4112, 1 << 30, kind
        )
        assert (setup.gpus, setup.started) == (1, ranks)
        line, env = command(CONTESTANTS["zigzag"], setup, tmp_path, None, 1)
        first, *others = env["PYTHONPATH"].split(os.pathsep)
        assert (
            (Path(first) / "sitecustomize.py").exists()
            and Path(first).name == kind
            and others == ["/elsewhere"]
        )
        assert "--disable-custom-all-reduce" in line and ("--expert-placement-verify" in line) == (
            kind == "lone"
        )
        assert (
            "--expert-placement-verify"
            not in command(CONTESTANTS["stock"], setup, tmp_path, None, 1)[0]
        ), "stock knows no such flag"
    for layout, site in (("dp", [str(one_gpu.HERE / "shared")]), ("tp", [])):
        setup = Setup("vllm", 2, layout, True, "float32", False, 0.1, 20, 1024, 1 << 30)
        assert command(CONTESTANTS["zigzag"], setup, tmp_path, None, 1)[1].get(
            "PYTHONPATH", ""
        ).split(os.pathsep)[:1] == (site or [""])
    for engine in ("vllm", "sglang"):
        for restless in (True, False):
            setup = Setup(
                engine, 2, "dp", False, "float16", False, 0.1, 20, 1024, 1 << 30, "shared", restless
            )
            line = command(CONTESTANTS["our EPLB"], setup, tmp_path, tmp_path, 1)[0]
            policy = json.loads(line[line.index("--expert-rebalance") + 1])
            assert (
                (policy["min_gain"] == 0 and policy["small_batches"] is False)
                if restless
                else policy["min_gain"] > 0
            ), "answers alone are asked"
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words, message in (
        (["--engine", "vllm", "--one-gpu", "lone"], "only SGLang with tensor-parallel attention"),
        (
            ["--engine", "sglang", "--one-gpu", "lone", "--layout", "dp"],
            "only SGLang with tensor-parallel attention",
        ),
        (
            ["--engine", "vllm", "--one-gpu", "shared", "--answers-only"],
            "give --eager --answers-only",
        ),
        (
            ["--engine", "sglang", "--cpu", "--layout", "dp"],
            "SGLang's CPU engine has no data-parallel attention",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["serving", *words, "--folder", str(tmp_path / "run")])
        assert main() == 2 and message in capsys.readouterr().err


def test_batches_share_what_the_others_are_compared_with():
    made = [[one.name for one in batch] for batch in batches(list(CONTESTANTS.values()), 6)]
    assert all(names[:2] == ["stock", "ideal"] and len(names) <= 6 for names in made)
    assert [name for names in made for name in names[2:]] == [
        n for n in CONTESTANTS if n not in ("stock", "ideal")
    ]
    alone = [CONTESTANTS["zigzag"], CONTESTANTS["eplb"]]
    assert batches(alone, 2) == [alone] and batches(alone[:1], 2) == [alone[:1]]
    with pytest.raises(
        PlacementError,
        match="--at-once 2: stock, ideal are always up and at least one more: give 3",
    ):
        batches(list(CONTESTANTS.values()), 2)


def test_batches_fit_into_the_gpus():
    """As on an H100: five servers, or four where two of them have EPLB's buffers."""
    gib = 1 << 30
    named = [
        "stock",
        "ideal",
        "linear",
        "zigzag",
        "eplb",
        "our EPLB",
        "engine EPLB",
        "our EPLB async",
        "balanced",
    ]
    takes = lambda one: (18 if one.moving else 14.5) * gib  # noqa: E731
    made = batches([CONTESTANTS[name] for name in named], 8, takes, 78 * gib)
    assert [[one.name for one in batch[2:]] for batch in made] == [
        ["linear", "zigzag", "eplb"],
        ["our EPLB", "engine EPLB"],
        ["our EPLB async", "balanced"],
    ]
    with pytest.raises(
        PlacementError,
        match="with our EPLB they take 50.5 GB of each GPU, of which 48.3 GB are free: use more "
        "--ranks",
    ):
        batches([CONTESTANTS[name] for name in named], 8, takes, 45 * gib)
