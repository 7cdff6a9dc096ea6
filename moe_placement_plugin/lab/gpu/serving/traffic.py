"""Ask a running server over its OpenAI API, streamed, and see what a user sees of it."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Workload:
    """Say what is asked.

    Attributes:
        requests: how many.
        prompt: tokens of each.
        answer: tokens generated for each, on average.
        concurrency: requests under way at once.
        words: how many of the tokens a round's prompts are made of, others in every round: experts
            that were hot grow cold; 0 for all.
        spread: how far the answers' lengths lie on both sides of ``answer``, as a share of it.
            Answers of one length that begin together end together, and the engine stands still
            until the API server has taken in as many new requests.
    """

    requests: int
    prompt: int
    answer: int
    concurrency: int
    words: int = 0
    spread: float = 0.0

    @property
    def longest(self) -> int:
        """Return the most tokens of a request, prompt and answer."""
        return self.prompt + round(self.answer * (1 + self.spread))

    def answers(self, seed: int) -> list[int]:
        """Return the tokens of each request's answer, evenly spread.

        They are in another order for every seed.
        """
        lengths = self.answer * np.linspace(1 - self.spread, 1 + self.spread, self.requests)
        return np.random.default_rng(seed).permutation(np.rint(lengths).astype(int)).tolist()

    def prompts(self, vocab: int, seed: int) -> list[list[int]]:
        """Draw random tokens, other ones for every seed, so that no prefix is cached.

        No time of the server's goes into tokenizing them.
        """
        rng = np.random.default_rng(seed)
        if self.words:
            return rng.choice(
                4 + rng.permutation(vocab - 4)[: self.words], (self.requests, self.prompt)
            ).tolist()
        return rng.integers(4, vocab, (self.requests, self.prompt)).tolist()


WORKLOADS = {
    "prefill": Workload(96, 4096, 4, 20),
    "decode": Workload(64, 64, 768, 64),
    "mixed": Workload(192, 512, 64, 64, spread=0.5),
    "drift": Workload(128, 4096, 8, 16, 64),
    "tiny": Workload(16, 24, 8, 4),
}
"""Name -> workload; ``tiny`` is for machines without a GPU.

Prompts of ``prefill`` are long: an API server takes in a few hundred requests a second, however
short, which is what a few layers on two GPUs would be measured by. Four fill a step, and so many
are under way that the next four wait while others are generated for: else every fourth step or so
generates only. ``decode`` is one wave of requests: an engine takes a prompt that comes later in a
forward pass of its own, and while SGLang took those without CUDA graphs that was three quarters of
the time that was measured.
"""


HEARTBEAT = 0.005
"""Seconds between two looks at how late the client is."""


@dataclass
class Seen:
    """Hold what was seen in one round of a workload.

    Attributes:
        seconds: from the first request to the last answer.
        tokens: prompt and generated tokens of all requests.
        first: seconds to each request's first token.
        between: mean seconds between its later tokens.
        longest: the longest wait between two pieces of one answer, seconds: a rebalance that stops
            the server shows here. A piece is as many tokens as the server streams at once.
        lag: the longest that this process kept its own event loop waiting, or the machine did,
            seconds: no wait of the server's.
        stolen: share of the processors' time that the host gave to other machines.
    """

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    longest: float = 0.0
    lag: float = 0.0
    stolen: float = 0.0

    def figures(self) -> dict[str, float]:
        """Return throughput and percentiles, times in milliseconds."""

        def at(values: list[float], percent: int) -> float:
            return float(np.percentile(values, percent)) * 1e3 if values else float("nan")

        return {
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_p50": at(self.first, 50),
            "ttft_p99": at(self.first, 99),
            "tpot_p50": at(self.between, 50),
            "tpot_p99": at(self.between, 99),
            "longest_gap": self.longest * 1e3,
            "client_lag": self.lag * 1e3,
            "stolen": self.stolen,
        }


def drive(url: str, workload: Workload, vocab: int, seed: int) -> Seen:
    """Run one round.

    Raises:
        RuntimeError: when a request fails.
    """
    try:
        return asyncio.run(_drive(url, workload, vocab, seed))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RuntimeError(f"{url}: {error!r}") from error


def post(url: str, body: dict) -> None:
    """Ask a server for something whose answer does not matter.

    Raises:
        OSError: when it refuses.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120):
        pass


async def _drive(url: str, workload: Workload, vocab: int, seed: int) -> Seen:
    seen, slots = Seen(), asyncio.Semaphore(workload.concurrency)
    asked = zip(workload.prompts(vocab, seed), workload.answers(seed))
    requests = [(_body(prompt, answer), len(prompt), answer) for prompt, answer in asked]
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=600), connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def one(body: bytes, prompt: int, answer: int) -> None:
            async with slots:
                await _request(session, url, body, prompt, answer, seen)

        with _no_garbage_collection():
            beat = asyncio.create_task(_heartbeat(seen))
            before, began = _processors(), time.perf_counter()
            await asyncio.gather(*(one(*request) for request in requests))
            seen.seconds = time.perf_counter() - began
            beat.cancel()
    passed = _processors() - before
    seen.stolen = float(passed[1] / passed[0]) if passed[0] else 0.0
    return seen


async def _heartbeat(seen: Seen) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(HEARTBEAT)
        seen.lag = max(seen.lag, time.perf_counter() - before - HEARTBEAT)


def _processors() -> np.ndarray:
    """Return the time of all processors since the machine started, and how much was stolen.

    The host gave that to other machines: ``proc_stat(5)``.
    """
    try:
        ticks = [
            int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
    except OSError:  # not Linux
        ticks = [0] * 8
    return np.array([sum(ticks), ticks[7]])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep this process from collecting garbage.

    Looking through all objects, PyTorch's too, takes a tenth of a second and more, which would
    count as the server's.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _body(prompt: list[int], answer: int) -> bytes:
    asked = {
        "model": "tiny",
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "prompt": prompt,
        "max_tokens": answer,
    }
    return json.dumps(asked).encode()


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: list[int], answer: int, seen: Seen
) -> None:
    """Send one request; what is seen of it is added to ``seen``.

    Raises:
        RuntimeError: when the server refuses.
        aiohttp.ClientError, TimeoutError: when it does not answer.
    """
    await _request(session, url, _body(prompt, answer), len(prompt), answer, seen)


async def _request(
    session: aiohttp.ClientSession, url: str, body: bytes, prompt: int, answer: int, seen: Seen
) -> None:
    began, times, at_first = time.perf_counter(), [], 0
    async with session.post(
        f"{url}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    ) as reply:
        if reply.status != 200:
            raise RuntimeError(f"{url} answered {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if line.startswith(b"data: {"):
                piece = json.loads(line[6:])
                if piece.get("error"):
                    raise RuntimeError(f"{url}: {piece['error']}")
                if piece.get("choices"):
                    times.append(time.perf_counter())
                    # A word is a token. A server may have more than one of them ready by the time
                    # that it sends the first.
                    at_first = at_first or max(1, len(piece["choices"][0]["text"].split()))
    if not times:
        raise RuntimeError(f"{url} answered nothing")
    seen.tokens += prompt + answer
    seen.first.append(times[0] - began)
    if len(times) > 1 and answer > at_first:
        seen.between.append((times[-1] - times[0]) / (answer - at_first))
        seen.longest = max(seen.longest, float(np.diff(times).max()))
