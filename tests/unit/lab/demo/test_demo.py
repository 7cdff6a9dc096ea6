"""Test the demonstration without engines: a server that fails is quoted.

Its checkpoints are complete.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.lab.demo.run import run
from moe_placement_plugin.lab.demo.tiny_models import Size, write_glm4_moe, write_qwen3_moe
from moe_placement_plugin.lab.servers.engines import SERVING_ENGINES
from moe_placement_plugin.lab.servers.server import free_port

FAILING = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        print("the engine has died", flush=True)
        self.send_error(500, "EngineCore encountered an issue")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("name", SERVING_ENGINES)
def test_a_server_whose_engine_dies_is_quoted(tmp_path, monkeypatch, name):
    if name == "vllm":
        pytest.importorskip("openai", reason="vLLM's answers are asked for through its client")
    engine = SERVING_ENGINES[name]
    monkeypatch.setattr(
        engine,
        "command",
        lambda model, port, placed: ([sys.executable, "-c", FAILING, str(port)], {}),
        raising=False,
    )
    with pytest.raises(
        PlacementError,
        match=r"stock \w+ on one rank: http.* gave no answer: .*500.*; its log ends:\n[^|]*the "
        r"engine has died",
    ):
        run(engine, "qwen", tmp_path, "zigzag", tmp_path, lambda *_: None, 30)
    with pytest.raises(PlacementError, match="gave no answer: "):
        engine.complete(f"http://127.0.0.1:{free_port()}", "tiny", [1], 1)


def test_checkpoints_are_reproducible_and_complete(tmp_path):
    from safetensors.numpy import load_file

    a = load_file(
        write_qwen3_moe(tmp_path / "a", num_experts=6, size=Size(32, 16)) / "model.safetensors"
    )
    b = load_file(
        write_qwen3_moe(tmp_path / "b", num_experts=6, size=Size(32, 16)) / "model.safetensors"
    )
    other = load_file(
        write_qwen3_moe(tmp_path / "c", num_experts=6, size=Size(32, 16), seed=1)
        / "model.safetensors"
    )
    assert all(np.array_equal(a[n], b[n]) for n in a) and not all(
        np.array_equal(a[n], other[n]) for n in a
    )
    assert a["model.layers.3.mlp.experts.5.down_proj.weight"].shape == (32, 16)
    glm = load_file(write_glm4_moe(tmp_path / "glm", num_experts=8) / "model.safetensors")
    assert (
        "model.layers.0.mlp.gate_proj.weight" in glm
        and "model.layers.1.mlp.gate.e_score_correction_bias" in glm
    )
