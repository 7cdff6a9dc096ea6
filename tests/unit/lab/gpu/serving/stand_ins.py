"""Stand in for what the tests of the serving benchmark do without.

Those are engines, servers and a command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np

from moe_placement_plugin import ExpertLoad, PlacementError
from moe_placement_plugin.lab.servers.server import Server

GIVEN = {
    "engine": "vllm",
    "cpu": True,
    "dtype": None,
    "model": "tiny",
    "layers": None,
    "workload": ["tiny"],
    "contestant": ["linear", "eplb"],
    "ranks": 2,
    "layout": "tp",
    "eager": False,
    "memory": 0.1,
    "interval": 1000,
    "at_once": None,
    "calibration": None,
    "json": None,
    "skip_recording": False,
    "quiet": None,
    "answers_only": False,
    "one_gpu": None,
    "kernels": False,
}
"""What a run's command line holds."""


def skewed(layers: int, experts: int) -> ExpertLoad:
    return ExpertLoad(
        (1000 * np.random.default_rng(0).lognormal(0, 0.6, (layers, experts))).astype(np.int64)
    )


class Slow(BaseHTTPRequestHandler):
    """Stream as an engine does: the first token after 50 ms, the others 10 ms apart.

    One of them comes after 200 ms.
    """

    asked: list[dict] = []

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Slow.asked.append(asked)
        self.send_response(500 if 4 in asked["prompt"] else 200)
        self.end_headers()
        for number in range(asked["max_tokens"]):
            time.sleep(0.05 if number == 0 else 0.2 if number == 3 else 0.01)
            self.wfile.write(
                b"data: " + json.dumps({"choices": [{"text": "x"}]}).encode() + b"\n\n"
            )
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

    def log_message(self, *_: object) -> None:
        pass


class Stub(Server):
    """Stand in for a server: it logs nothing but the errors that its starts end with."""

    def __init__(self, name: str, log: Path, errors: Sequence[str] = ()):
        super().__init__([], 0, {}, log)
        self.name, self.errors, self.stopped = name, list(errors), False

    @property
    def url(self) -> str:
        return self.name

    def __enter__(self):
        error = self.errors.pop(0) if self.errors else ""
        self.log.write_text(error)
        if error:
            raise PlacementError(f"the server ended with code 1 before it was ready{self._why()}")
        return self

    def stop(self) -> None:
        self.stopped = True
