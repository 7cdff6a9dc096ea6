"""Profile a server's kernels, while it decodes and while it takes in prompts.

The engine's own torch profiler does it.

Servers of one model and one load run the same number of MoE layers, so time per MoE layer can be
compared kernel by kernel: what a placement, redundant experts or counting the load add shows as a
kernel that others have not, or as more time in one that all have.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from .... import PlacementError
from .traffic import WORKLOADS, Workload, drive, post

LOADS = {"decode": Workload(128, 64, 24, 128), "prefill": Workload(16, 4096, 1, 16)}
"""Short: a trace has an event for each kernel that was launched."""
MOE_KERNEL = "fused_moe"
"""Part of the name of both engines' Triton kernel, which is launched twice in a layer."""
EXPERTS = re.compile(
    r"fused_moe|act_and_mul|moe_align_block_size|count_and_sort_expert_tokens|moe_sum"
)
"""All that runs for the experts of a rank.

It is what `moe-placement bench layer` times: not the choice of them, nor the exchange.
"""
OWN_WORK = re.compile(
    r"^(?!.*(nccl|all_?reduce|all_?gather|reduce_?scatter|cross_device))", re.IGNORECASE
)
"""All kernels but those that wait for other ranks."""


def vllm_arguments(folder: Path) -> list[str]:
    """Return what a vLLM server needs to be profiled when asked to; SGLang needs nothing."""
    settings = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder),
        "torch_profiler_with_stack": False,
        "ignore_frontend": True,
    }
    return ["--profiler-config", json.dumps(settings)]


@dataclass(frozen=True)
class ProfiledServer:
    """Describe a server whose kernels are looked at.

    Attributes:
        url: its address.
        engine: ``vllm`` or ``sglang``.
        folder: where it writes its traces, one per rank; its own.
        ranks: that run.
        cpu: whether operators count instead of kernels, under the tiny load.
    """

    url: str
    engine: str
    folder: Path
    ranks: int
    cpu: bool = False


def profile(server: ProfiledServer, load: str, vocab: int, seconds: float = 60) -> dict:
    """Profile a server.

    Args:
        server: the server.
        load: one of `LOADS`.
        vocab: tokens to ask with.
        seconds: until the traces must be there.

    Returns:
        What `per_layer` says of the traces.

    Raises:
        PlacementError: when a rank's trace does not come.
        RuntimeError, OSError: when the server refuses what it is asked.
    """
    url, folder = server.url, server.folder
    folder.mkdir(parents=True, exist_ok=True)
    asked = {}
    if server.engine == "sglang":
        asked = {"output_dir": str(folder), "activities": ["CPU" if server.cpu else "GPU"]}
    before = set(_traces(folder))
    post(f"{url}/start_profile", asked)
    try:
        drive(url, WORKLOADS["tiny"] if server.cpu else LOADS[load], vocab, 5)
    finally:
        post(f"{url}/stop_profile", {})  # a profiler that runs refuses the next start
    traces = _new_traces(folder, before, url, server.ranks, seconds)
    return per_layer(traces, "cpu_op" if server.cpu else "kernel")


def _new_traces(
    folder: Path, before: set[Path], url: str, ranks: int, seconds: float
) -> list[list[dict]]:
    """Return the events of each trace that is in a folder now and was not before.

    It waits until there is one of each rank and all are whole.
    """
    end = time.monotonic() + seconds
    while True:
        found = sorted(set(_traces(folder)) - before)
        try:
            events = [_events(path) for path in found]
        except (OSError, EOFError, ValueError):
            events = []  # one is being written
        if len(events) >= ranks:
            return events
        if time.monotonic() > end:
            raise PlacementError(
                f"{url} wrote {len(events)} whole traces of {ranks} ranks into {folder} within "
                f"{seconds:g} s"
            )
        time.sleep(0.5)


def per_layer(ranks: Sequence[Sequence[Mapping]], category: str) -> dict:
    """Return what a MoE layer takes, from the end of one's MoE kernels to the end of the next's.

    Args:
        ranks: the events of each rank's trace.
        category: of the events that count.

    Returns:
        Microseconds. ``kernels``: name without template arguments -> [time, launches] in a layer;
        ``ranks``: of each rank, its `OWN_WORK`, so that ranks of equal work and unequal speed show;
        ``span``: from layer to layer, with what the GPU waits in between; ``moe``: the MoE kernels
        of the layer's busiest rank, ``experts``: `EXPERTS` likewise. All are medians of the layers,
        and means of the ranks but for those: most steps of a load are alike, its first and last are
        not. ``moe_total`` and ``experts_total``: the sums of all layers, which are of the same
        tokens in every server, however they came to be cut into steps.
    """
    cut = [_layers([event for event in events if event.get("cat") == category]) for events in ranks]
    sums = [[_by_kernel(events) for events in layers] for layers in cut]
    names = {name for rank in sums for layer in rank for name in layer}
    kernels = {
        name: [
            fmean(
                median(layer[name][at] if name in layer else 0.0 for layer in rank) for rank in sums
            )
            for at in (0, 1)
        ]
        for name in names
    }
    busiest = {
        what: [
            max(times)
            for times in zip(*([_spent(events, kernel) for events in layers] for layers in cut))
        ]
        for what, kernel in (("moe", re.compile(MOE_KERNEL)), ("experts", EXPERTS))
    }
    own = [median(_spent(events, OWN_WORK) for events in layers) for layers in cut]
    span = fmean(
        median(_end(after) - _end(before) for before, after in pairwise(layers))
        if len(layers) > 1
        else 0.0
        for layers in cut
    )
    found = {"kernels": {n: v for n, v in kernels.items() if v[1]}, "span": span, "ranks": own}
    return (
        found
        | {what: median(times) for what, times in busiest.items()}
        | {f"{what}_total": sum(times) for what, times in busiest.items()}
    )


def _by_kernel(events: Sequence[Mapping]) -> dict[str, list[float]]:
    """Name -> [time, launches]."""
    made: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        of = made[short(event["name"])]
        of[0] += event["dur"]
        of[1] += 1
    return made


def _layers(events: list[Mapping]) -> list[list[Mapping]]:
    """Cut one rank's events into layers, each from behind the MoE kernels of the one before.

    All are one when there is no such kernel.
    """
    events = sorted(events, key=lambda event: event.get("ts", 0))
    ends = [number + 1 for number, event in enumerate(events) if MOE_KERNEL in event["name"]][1::2]
    return [events[start:end] for start, end in pairwise(ends)] or [events]


def _spent(events: Sequence[Mapping], kernel: re.Pattern) -> float:
    return sum(event["dur"] for event in events if kernel.search(event["name"]))


def _end(events: Sequence[Mapping]) -> float:
    return events[-1]["ts"] + events[-1]["dur"]


def short(name: str) -> str:
    """Return a kernel's name without return type, template arguments and parameters."""
    name = re.sub(r"^void ", "", name.replace("(anonymous namespace)", ""))
    return re.split(r"[<(]", name, maxsplit=1)[0][:70] or name[:70]


def _traces(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".json", ".json.gz"))]


def _events(path: Path) -> list[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)["traceEvents"]
