"""Test servers in child processes: started, watched, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from moe_placement_plugin import PlacementError
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


def test_a_server_ends_when_the_process_that_started_it_is_terminated(tmp_path):
    """What `timeout` and a cluster's scheduler send must not leave an engine behind."""
    port = free_port()
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from moe_placement_plugin.lab.servers.server import Server\n"
        f"with Server([sys.executable, '-c', {HEALTHY!r}, '{port}'], {port}, {{}},"
        f" Path({str(tmp_path / 'log')!r}), 30):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as starter:
        assert starter.stdout.readline() == b"ready\n"
        starter.send_signal(signal.SIGTERM)
        assert starter.wait(timeout=40) == 128 + signal.SIGTERM
    child = int((tmp_path / "log").read_text().split()[1])
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
