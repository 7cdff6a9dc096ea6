"""Test what a run decides and records before and while it measures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="checkpoints are made with torch")
pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin import PlacementError  # noqa: E402
from moe_placement_plugin.formats.load_file import read_load, write_load  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.answers import ANSWERED, ASKED  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.contestants import CONTESTANTS  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.kernels import (  # noqa: E402
    LOADS,
    ProfiledServer,
    per_layer,
)
from moe_placement_plugin.lab.gpu.serving.models import MODELS, wanted_shares  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.run import Run  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import WORKLOADS  # noqa: E402

from .stand_ins import GIVEN, skewed  # noqa: E402


def test_a_server_takes_the_longest_prompt_that_it_is_asked(tmp_path):
    """Profiles have prompts of their own.

    Servers that were started for short workloads refused them.
    """

    def length(**given) -> int:
        return Run(SimpleNamespace(**GIVEN | given), tmp_path).setup.length

    assert (
        length(workload=["decode"], cpu=False) == 1024
        and length(workload=["prefill"], cpu=False) > WORKLOADS["prefill"].longest
    )
    assert length(workload=["decode"], cpu=False, kernels=True) > max(
        load.longest for load in LOADS.values()
    )
    assert length(kernels=True) == 1024, "without a GPU the tiny workload is profiled"


def test_what_is_recorded_first_is_recorded_with_tensor_parallel_attention(tmp_path):
    """SGLang refuses to record with data-parallel attention.

    There ranks route each other's tokens.
    """
    run = Run(
        SimpleNamespace(
            **GIVEN | {"engine": "sglang", "layout": "dp", "cpu": False, "contestant": None}
        ),
        tmp_path,
    )
    assert {one.name for one in run.contestants} >= {"linear", "eplb+8", "our EPLB"} and not any(
        one.recording for one in run.contestants
    )
    assert "--enable-dp-attention" in run.server(CONTESTANTS["linear"]).command
    first = run.server(CONTESTANTS["linear"], run.recording).command
    assert "--enable-dp-attention" not in first and "--expert-load-record" in first
    with pytest.raises(
        PlacementError, match="sglang with --layout dp has none of linear.recording"
    ):
        Run(
            SimpleNamespace(
                **GIVEN
                | {
                    "engine": "sglang",
                    "layout": "dp",
                    "cpu": False,
                    "contestant": ["linear+recording"],
                }
            ),
            tmp_path,
        )


def test_experts_move_while_answers_are_compared(tmp_path):
    """An answer is a pass a token: in a thousand of them there is none left to compare."""
    for answers_only, given, interval in (
        (True, None, 20),
        (False, None, 1000),
        (True, 7, 7),
        (False, 7, 7),
    ):
        run = Run(
            SimpleNamespace(**GIVEN | {"answers_only": answers_only, "interval": given}), tmp_path
        )
        assert (run.setup.interval, run.setup.restless) == (interval, answers_only)
        assert ANSWERED * ASKED > 5 * run.setup.interval or not answers_only


def test_a_log_that_looks_like_markup_is_printed_as_it_is(capsys, tmp_path):
    """gloo begins its errors with the file that they are from.

    A run ended when it was to tell of a server that did not start.
    """
    said = "stock did not start: [/pytorch/gloo/pair.cc:547] Connection closed, [red]"
    Run(SimpleNamespace(**GIVEN), tmp_path).journal.fail(said)
    assert said in capsys.readouterr().out


def test_a_profile_that_fails_loses_no_other(tmp_path, monkeypatch):
    def profile(server: ProfiledServer, load: str, *_: object) -> dict:
        if (server.url, load) == ("http://127.0.0.1:1", "prefill"):
            raise RuntimeError("the input is too long")
        return per_layer([[{"cat": "kernel", "name": "norm", "ts": 0.0, "dur": 1.0}]], "kernel")

    monkeypatch.setattr("moe_placement_plugin.lab.gpu.serving.kernels.profile", profile)
    run = Run(SimpleNamespace(**GIVEN), tmp_path)
    found = run.measuring.profile(
        {
            "stock": SimpleNamespace(url="http://127.0.0.1:1"),
            "linear": SimpleNamespace(url="http://127.0.0.1:2"),
        }
    )
    assert {name: list(of) for name, of in found.items()} == {
        "stock": ["decode"],
        "linear": ["decode", "prefill"],
    }
    assert run.journal.failed == ["stock was not profiled, prefill: the input is too long"]


def test_a_recording_is_used_again_only_for_the_same_model(tmp_path, monkeypatch):
    write_load(skewed(3, 32), tmp_path / "other.safetensors")
    run = Run(SimpleNamespace(**GIVEN, recorded=tmp_path / "other.safetensors"), tmp_path / "run")
    run.journal.result["router"] = {"wanted": wanted_shares(None, MODELS["tiny"]).tolist()}
    monkeypatch.setattr(Run, "server", lambda *_: pytest.fail("a server was started to record"))
    assert (
        set(run.record()["balancedness"]) == {"linear", "eplb"}
        and read_load(run.recording).num_layers == 3
    )
    write_load(skewed(2, 32), tmp_path / "other.safetensors")
    with pytest.raises(
        PlacementError, match="other.safetensors: 2 layers x 32 experts, the model has 3 x 32"
    ):
        run.record()
