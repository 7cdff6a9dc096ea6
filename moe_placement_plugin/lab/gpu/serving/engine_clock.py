"""Read the time per generated token off the engine's own clock.

It tells a slow engine from a slow API server, client or host.

A user waits for all of them. But a model of a few layers may generate tokens faster than one API
server passes them on, and then what a user sees of two placements is how fast that was.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BATCH = re.compile(
    r"\[\d{4}-\d\d-\d\d [\d:]+([^\]]*)\] (Prefill|Decode) batch.*?#running-req: (\d+)(?:.*?gen "
    r"throughput \(token/s\): ([\d.]+))?"
)
"""A line of SGLang's log: one for 40 passes of decoding and one for each of prefill."""
LATENCY = re.compile(r"^vllm:inter_token_latency_seconds_(sum|count)\{.*\} (\S+)$", re.MULTILINE)
"""A line of vLLM's metrics, by the engine core's clock."""


@dataclass(frozen=True)
class EngineClock:
    """Read one server's clock.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        url: of the server.
        log: its output.
    """

    engine: str
    url: str
    log: Path

    def read(self) -> dict[str, float]:
        """Return where it stands, for `per_token`."""
        if self.engine == "sglang":
            return {"size": len(self._log())}
        return latencies(self._get("/metrics"))

    def per_token(self, before: Mapping[str, float]) -> float | None:
        """Return the mean milliseconds per token of a request since ``before``.

        It is None when the engine told nothing.
        """
        if self.engine == "sglang":
            return decoding(self._log()[int(before["size"]) :])
        now = latencies(self._get("/metrics"))
        tokens = now["count"] - before["count"]
        return 1e3 * (now["sum"] - before["sum"]) / tokens if tokens > 0 else None

    def _log(self) -> str:
        return self.log.read_text(errors="replace")

    def _get(self, path: str) -> str:
        """Return what the server answers, nothing if it does not.

        It is missed in one column then, and in nothing else.
        """
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.read().decode()
        except OSError:
            return ""


def latencies(metrics: str) -> dict[str, float]:
    """Read seconds between tokens, and how many, of all engines behind a vLLM server."""
    found = {"sum": 0.0, "count": 0.0}
    for what, value in LATENCY.findall(metrics):
        found[what] += float(value)
    return found


def decoding(log: str) -> float | None:
    """Return the mean milliseconds per token of a request, from a part of a SGLang server's log.

    A line counts from the one before it. After prefill it has that in it and the wait for requests,
    and where requests ended since then it does not say how many the tokens were of, so that both
    are left out: of a mixed load little or nothing is told.
    """
    times, last = [], {}
    for rank, kind, running, throughput in BATCH.findall(log):
        if (
            (kind, running) == last.get(rank)
            and kind == "Decode"
            and throughput
            and float(throughput)
            and int(running)
        ):
            times.append(1e3 * int(running) / float(throughput))
        last[rank] = kind, running
    return sum(times) / len(times) if times else None
