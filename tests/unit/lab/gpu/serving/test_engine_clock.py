"""Time per token by the engine's own clock, from what the engines print."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moe_placement_plugin.lab.gpu.serving.engine_clock import EngineClock, decoding


def decode(rank: str, running: int, throughput: float) -> str:
    """Return a line as SGLang writes it every 40 forward passes."""
    rest = (
        "#token: 12288, token usage: 0.16, cuda graph: True, "
        f"gen throughput (token/s): {throughput:.2f}, #queue-req: 0"
    )
    return f"[2026-11-28 07:55:48 {rank}] Decode batch, #running-req: {running}, {rest}\n"


BEFORE = (
    "[2026-11-28 07:55:47 TP0 EP0] Prefill batch, #new-seq: 38, #new-token: 2432, #cached-token: "
    "0, token usage: 0.10, #running-req: 90, "
    "#queue-req: 0, input throughput (token/s): 1.0, cuda graph: False\n"
    + decode("TP0 EP0", 128, 7719.36)
)
LOG = (
    BEFORE
    + decode("TP0 EP0", 128, 32000)
    + decode("DP1 TP1 EP1", 64, 99)
    + '[2026-11-28 07:55:48] INFO:     127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 200 OK\n'
    + decode("TP0 EP0", 128, 128000 / 6)
    + decode("DP1 TP1 EP1", 64, 12800)
    + decode("TP0 EP0", 1, 20000)
)


def test_sglangs_log():
    """What was behind a prefill of the same rank, or may have been, is left out.

    So is that in which 127 requests ended: 4, 6 and 5 milliseconds remain.
    """
    assert decoding(LOG) == pytest.approx(5.0) and decoding(BEFORE) is None


class Metrics(BaseHTTPRequestHandler):
    """Serve the metrics of two engines behind one server.

    What was generated grows from look to look.
    """

    looks = 0

    def do_GET(self) -> None:
        looks = type(self).looks = type(self).looks + 1
        text = f"""\
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{{engine="0",le="0.01",model_name="tiny"}} {50.0 * looks}
vllm:inter_token_latency_seconds_count{{engine="0",model_name="tiny"}} {100.0 * looks}
vllm:inter_token_latency_seconds_sum{{engine="0",model_name="tiny"}} {0.4 * looks}
vllm:inter_token_latency_seconds_count{{engine="1",model_name="tiny"}} {1e2 * looks}
vllm:inter_token_latency_seconds_sum{{engine="1",model_name="tiny"}} {6e-1 * looks}
vllm:request_time_per_output_token_seconds_sum{{engine="0",model_name="tiny"}} 77.0
"""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_both_engines_are_read_from_one_moment_to_another(tmp_path):
    log = tmp_path / "log"
    log.write_text(BEFORE)
    clock = EngineClock("sglang", "http://nowhere", log)
    before = clock.read()
    assert clock.per_token(before) is None
    log.write_text(LOG)
    assert clock.per_token(before) == pytest.approx(5.5), (
        "the first line counts from a moment that was not looked at"
    )

    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        clock = EngineClock("vllm", f"http://127.0.0.1:{server.server_port}", log)
        before = clock.read()
        assert before == {"sum": 1.0, "count": 200.0} and clock.per_token(before) == pytest.approx(
            5.0
        )
        server.shutdown()
    gone = EngineClock("vllm", f"http://127.0.0.1:{server.server_port}", log)
    assert gone.per_token(gone.read()) is None
