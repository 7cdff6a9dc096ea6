import os
import signal
import sys
import time
import urllib.request

import numpy as np
import pytest

from moe_placement_plugin import PlacementError
from moe_placement_plugin.engines.common import installed
from moe_placement_plugin.lab.demo.run import run
from moe_placement_plugin.lab.demo.tiny_models import Size, write_glm4_moe, write_qwen3_moe
from moe_placement_plugin.lab.servers.engines import SERVING_ENGINES
from moe_placement_plugin.lab.servers.server import Server, free_port

HEALTHY = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"ok")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_and_its_children_end_with_the_block(tmp_path):
    port = free_port()
    with Server(
        [sys.executable, "-c", HEALTHY, str(port)], port, {}, tmp_path / "log", 30
    ) as server:
        assert urllib.request.urlopen(f"{server.url}/health").read() == b"ok"
        child = int((tmp_path / "log").read_text().split()[1])
        os.kill(child, 0)
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{server.url}/health", timeout=2)
    # Ended; at most a zombie that waits for init is left.
    state = f"/proc/{child}/stat"
    assert not os.path.exists(state) or open(state).read().split()[2] == "Z"


def test_a_server_that_cannot_be_interrupted_is_ended_at_once(tmp_path):
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        port = free_port()
        with Server([sys.executable, "-c", HEALTHY, str(port)], port, {}, tmp_path / "log", 30):
            began = time.monotonic()
        assert time.monotonic() - began < 10
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "code, timeout, message",
    [
        (
            "print('no model'); raise SystemExit(3)",
            30,
            "ended with code 3 before it was ready:\nno model",
        ),
        ("import time; time.sleep(60)", 2, "not ready after 2 s"),
        # Engines end with words of their own, far below what was wrong.
        (
            "print('x.errors.PlacementError: no load', *'rest', sep=chr(10)); raise SystemExit(1)",
            30,
            "ended with code 1 before it was ready: no load\\nx.errors",
        ),
        (
            "print('moe_placement_plugin.a.b.Mismatch: layer 2'); raise SystemExit(1)",
            30,
            "before it was ready: layer 2\\nmoe",
        ),
        (
            "print('INFO:moe_placement_plugin.engines.sglang: loaded'); raise SystemExit(1)",
            30,
            "before it was ready:\\nINFO",
        ),
    ],
)
def test_a_server_that_does_not_start_says_why(tmp_path, code, timeout, message):
    with pytest.raises(PlacementError, match=message):
        with Server([sys.executable, "-c", code], free_port(), {}, tmp_path / "log", timeout):
            pass


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
        match=r"stock \w+ on one rank: http.* gave no answer: .*500.*; its log ends:\n[^|]*the engine has died",
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


def test_engines_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    assert installed.installed_engines() == {}
    with pytest.raises(PlacementError, match="neither vLLM nor SGLang is installed: install one"):
        installed.require_engine()
    monkeypatch.setattr(installed, "find_spec", lambda name: object() if name == "vllm" else None)
    assert installed.require_engine() == "vllm"
    with pytest.raises(
        PlacementError,
        match="sglang is not installed in this environment .found: vllm.: install it",
    ):
        installed.require_engine("sglang")
