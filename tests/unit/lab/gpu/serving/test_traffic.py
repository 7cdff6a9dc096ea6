"""Test prompts and answers of a workload, and what a user sees of them."""

from __future__ import annotations

import gc
import json
import threading
import time
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip(
    "aiohttp", reason="the benchmark asks servers through aiohttp, which both engines bring"
)

from moe_placement_plugin.lab.gpu.serving.contestants import CACHE_TOKENS  # noqa: E402
from moe_placement_plugin.lab.gpu.serving.traffic import WORKLOADS, Workload, drive  # noqa: E402

from .stand_ins import Slow  # noqa: E402


def test_prompts():
    """Prompts are others in every round, of all tokens but the special ones, or of a few.

    The few are others in every round too.

    2,000 draws of 296 tokens miss 296 (1 - 1 / 296) ** 2000 = 0.34 of them on average.
    """
    every, few = Workload(50, 40, 1, 1), Workload(50, 40, 1, 1, 8)
    rounds = [[np.array(one.prompts(300, seed)) for seed in (0, 1, 1)] for one in (every, few)]
    for first, second, again in rounds:
        assert (
            first.shape == (50, 40)
            and min(first.min(), second.min()) >= 4
            and max(first.max(), second.max()) < 300
        )
        assert (second == again).all() and (first != second).any()
    tokens = [set(prompts.flatten().tolist()) for prompts in rounds[1][:2]]
    assert (
        [len(t) for t in tokens] == [8, 8]
        and len(tokens[0] & tokens[1]) < 8
        and len(np.unique(rounds[0][0])) > 290
    )


def test_answers_of_different_lengths_end_at_different_times():
    spread = Workload(9, 4, 20, 3, spread=0.5)
    lengths, others = spread.answers(0), spread.answers(1)
    assert sorted(lengths) == sorted(others) and lengths != others and len(set(lengths)) == 9, (
        "as many tokens in every round"
    )
    assert (min(lengths), max(lengths), sum(lengths)) == (10, 30, 180) and spread.longest == 34
    assert Workload(9, 4, 20, 3).answers(0) == [20] * 9
    cached = max(one.concurrency * one.longest for one in WORKLOADS.values())
    assert cached <= CACHE_TOKENS, "all that is under way at once fits into a server's cache"


@pytest.mark.slow
def test_traffic_measures_what_a_user_sees(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        seen = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        figures = seen.figures()
        assert seen.tokens == 4 * 9 and len(seen.first) == len(seen.between) == 4
        assert (
            figures["ttft_p50"] >= 50
            and figures["longest_gap"] >= 200
            and figures["tpot_p50"] >= (200 + 4 * 10) / 5
        )
        # Two at a time: two batches, one after the other.
        assert seen.seconds >= 2 * (0.05 + 0.2 + 4 * 0.01) and figures[
            "tokens_per_s"
        ] == pytest.approx(36 / seen.seconds)
        assert gc.isenabled() and 0 <= seen.stolen < 1
        drive(url, Workload(3, 3, 6, 3, spread=0.5), 10**6, 0)
        assert sorted(body["max_tokens"] for body in Slow.asked[-3:]) == [3, 6, 9]
        # What holds up the client holds up what it measures: that is told apart.
        # A busy machine does so too, but not in each of many runs.
        deadline = time.monotonic() + 60
        while seen.lag >= 0.1 and time.monotonic() < deadline:
            seen = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        assert seen.lag < 0.1
        sleepy = iter([0.3])
        slow = SimpleNamespace(
            dumps=json.dumps, loads=lambda text: time.sleep(next(sleepy, 0)) or json.loads(text)
        )
        monkeypatch.setattr("moe_placement_plugin.lab.gpu.serving.traffic.json", slow)
        late = drive(url, Workload(4, 3, 6, 2), 10**6, 0)
        assert 0.25 < late.lag and late.figures()["client_lag"] == late.lag * 1e3
        with pytest.raises(RuntimeError, match="answered 500"):
            drive(url, Workload(1, 2, 2, 1), 5, 0)  # the only token is 4
        assert gc.isenabled()
    finally:
        server.shutdown()
