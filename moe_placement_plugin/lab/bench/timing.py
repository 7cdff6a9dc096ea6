"""Time short device work: CUDA graphs and events on a GPU, the clock elsewhere."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from .planner.run import machine

FLUSH_BYTES = 256 << 20
"""Bytes that are written before every timed run on a GPU.

Weights then do not lie in the L2 cache, as they do not in a model's forward pass.
"""


class Stopwatch:
    """Time functions on one device.

    Args:
        device: where they run.
        graphs: on CUDA, replay a CUDA graph of the function rather than launch its kernels one by
            one. Work that waits for the device (all-to-all, the torch matmuls) cannot be captured.
    """

    def __init__(self, device: torch.device, graphs: bool = True):
        self.device = device
        self._cuda = device.type == "cuda"
        self._graphs = graphs and self._cuda
        self._pool: Any = None
        self._captures: weakref.WeakSet = weakref.WeakSet()
        # One for all captures: the allocator keeps what is freed for the stream that it was used
        # on.
        self._stream: Any = torch.cuda.Stream(device) if self._graphs else None
        self._flush: Any = (
            torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self._cuda else None
        )

    def prepare(self, function: Callable[[], Any], warmups: int = 2) -> Callable[[], float]:
        """Warm up and capture; each call of the answer runs the function once.

        It returns microseconds.
        """
        for _ in range(warmups):
            function()
        if not self._cuda:
            return lambda: self._by_clock(function)
        torch.cuda.synchronize(self.device)
        run = function
        if self._graphs:
            if (
                torch.cuda.memory_reserved(self.device)
                > torch.cuda.get_device_properties(self.device).total_memory // 2
            ):
                torch.cuda.empty_cache()  # what the warm-up used is not the pool's to take
            run = self._captured(function).replay
        return lambda: self._by_events(run)

    def _captured(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph(), which collects garbage every time: seconds, over thousands of
        # captures beside an engine's modules.
        graph, stream = torch.cuda.CUDAGraph(), self._stream
        if not self._captures:
            # A pool goes with the last graph that uses it, and capturing into it then fails.
            self._pool = torch.cuda.graph_pool_handle()
        self._captures.add(graph)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            # Graphs are replayed one at a time, so they may share their memory. NCCL's watchdog is
            # another thread, which asks for events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            function()
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return graph

    def _by_events(self, run: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    @staticmethod
    def _by_clock(function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e6


def in_turn(runs: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, np.ndarray]:
    """Run every contestant once per round, in alternating order (A B, B A, ...).

    Returns the microseconds of each, ``[rounds]``.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in runs if index % 2 == 0 else reversed(runs):
            times[name].append(runs[name]())
    return {name: np.array(values) for name, values in times.items()}


def ratio(times: Mapping[Any, np.ndarray], name: Any, base: Any) -> float:
    """Return the median over rounds of one contestant's time over another's in the same round."""
    return float(np.median(times[name] / times[base]))


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return device name, processor and versions, for reports."""
    facts: dict[str, Any] = {**machine(), "torch": torch.__version__}
    facts["load_average"] = round(facts["load_average"][0], 1)
    facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["cpu"]
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    try:
        facts["triton"] = version("triton")
    except PackageNotFoundError:
        pass
    return facts
