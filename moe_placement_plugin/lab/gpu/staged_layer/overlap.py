"""Measure how much of the exchange the layer's chunking hides."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .... import Placement
from ....core.placement import even_slots
from ...bench.timing import Stopwatch, in_turn
from ...staged_layer import (
    PlacedExperts,
    Routing,
    StagedMoE,
    dispatch,
    gmm_down,
    gmm_up,
    plan_dispatch,
)
from ...staged_layer.stages import select
from .process import Process


def overlap(process: Process) -> list[dict]:
    """Time the whole layer in 1, 2, 4, ... chunks, and its computation alone.

    Each time is the slowest rank's.
    """
    shape, rank, size = process.shape, process.group.rank, process.group.size
    plan = Placement(np.arange(shape.experts)[None], shape.experts, even_slots(shape.experts, size))
    placed = PlacedExperts.of(plan, 0, rank, process.device)
    torch.manual_seed(rank)
    weights = process.weights(placed.num_local, shape)
    routing = Routing(shape.experts, shape.top_k)
    watch = Stopwatch(process.device, graphs=process.arguments.graphs)
    rows = []
    for tokens in process.tokens([4096, 8192, 16384]):
        x = torch.randn(tokens, shape.hidden, device=process.device).to(process.dtype)
        logits = torch.randn(tokens, shape.experts, device=process.device)
        # The all-to-all waits for the device to know how much to send, which no graph can hold.
        for use_ring in (True,) if process.arguments.graphs else (True, False):
            layer = StagedMoE(
                routing, placed, weights, process.matmuls, process.group, None, use_ring
            )
            rows.append(_overlap_of(process, layer, x, logits, watch))
    return rows


def _overlap_of(
    process: Process, layer: StagedMoE, x: torch.Tensor, logits: torch.Tensor, watch: Stopwatch
) -> dict:
    """Time one exchange's chunkings, and print how much of it each hides."""
    times = _times(process, layer, x, logits, watch)
    exposed = np.median(times["whole"] - times["computation"])
    row = {
        "tokens": len(x),
        "exchange": "ring" if layer.use_ring else "all-to-all",
        "graphs": process.arguments.graphs,
        "whole_us": float(np.median(times["whole"])),
        "computation_us": float(np.median(times["computation"])),
        "exposed_us": float(exposed),
        "chunked": {},
    }
    process.say(
        f"overlap: {row['exchange']}, {len(x)} tokens per rank: whole {row['whole_us']:.1f} us, "
        f"computation {row['computation_us']:.1f} us, exchange exposed {exposed:.1f} us"
    )
    for name in [n for n in times if n not in ("computation", "whole")]:
        hidden = np.median(times["whole"] - times[name]) / exposed
        row["chunked"][name] = {"us": float(np.median(times[name])), "hidden": float(hidden)}
        process.say(
            f"  {name:20s} {np.median(times[name]):9.1f} us, "
            f"{hidden:6.1%} of the exposed exchange hidden"
        )
    return row


def _times(
    process: Process, layer: StagedMoE, x: torch.Tensor, logits: torch.Tensor, watch: Stopwatch
) -> dict[str, np.ndarray]:
    """Return the slowest rank's microseconds of every chunking, ``[rounds]``, all in turn."""

    def together(run: Callable[[], float]) -> Callable[[], float]:
        def timed() -> float:
            process.agree(True)  # begin at the same time
            return run()

        return timed

    calls = _calls(process, layer, x, logits)
    runs = {name: together(watch.prepare(call)) for name, call in calls.items()}
    mine = in_turn(runs, process.arguments.rounds)
    return {name: _slowest(process, values) for name, values in mine.items()}


def _calls(
    process: Process, layer: StagedMoE, x: torch.Tensor, logits: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """Return what is timed: the computation alone, the whole layer, and every chunking."""
    group, matmuls = process.group, process.matmuls
    selection = select(logits, layer.routing, layer.placed)
    (plan,) = plan_dispatch([selection], layer.placed, group, layer.use_ring)
    here, output, _ = dispatch(x, selection, plan, layer.placed, group)
    known = [len(x)] * group.size if layer.use_ring else None

    def computing() -> object:
        chosen = select(logits, layer.routing, layer.placed)
        hidden = gmm_up(here, output, layer.weights, matmuls)
        return gmm_down(hidden, output, layer.weights, matmuls), chosen

    calls: dict[str, Callable[[], object]] = {
        "computation": computing,
        "whole": lambda: layer(x, logits, 1, 1, known),
        "own tokens first": lambda: layer(x, logits, 1, 1, known, True),
    }
    for chunks in process.arguments.chunks:
        calls[f"{chunks} token chunks"] = lambda c=chunks: layer(x, logits, c, 1, known)
        if layer.use_ring and chunks * 64 <= process.shape.hidden:
            calls[f"{chunks} embedding chunks"] = lambda c=chunks: layer(x, logits, 1, c, known)
    return calls


def _slowest(process: Process, values: np.ndarray) -> np.ndarray:
    """Return the greatest of all ranks' microseconds, ``[rounds]``."""
    nanoseconds = process.group.all_gather_ints([int(v * 1000) for v in values], process.device)
    return np.max(nanoseconds, axis=0) / 1000
