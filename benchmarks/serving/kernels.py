"""Where a server's time goes on the GPUs: its kernels under a load of decoding, from the engine's own torch profiler.

Servers of one model and one load run the same number of MoE layers, so time per MoE layer can be compared kernel by kernel: what a placement,
redundant experts or counting the load add shows as a kernel that others have not, or as more time in one that all have.
"""

from __future__ import annotations

import gzip
import json
import re
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from moe_placement_plugin import PlacementError

from .traffic import WORKLOADS, Workload, drive

LOAD = Workload(128, 64, 24, 128)
"""Short: a trace has an event for each kernel that was launched."""
MOE_KERNEL = "fused_moe"
"""Of both engines' Triton kernel's name, which is launched twice in a layer."""
SHOWN = 16


def vllm_arguments(folder: Path) -> list[str]:
    """What a vLLM server needs to be profiled when it is asked to; SGLang needs nothing."""
    settings = {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False, "ignore_frontend": True}
    return ["--profiler-config", json.dumps(settings)]


def profile(url: str, engine: str, folder: Path, vocab: int, cpu: bool = False, seconds: float = 60) -> dict[str, list[float]]:
    """Profile a server under `LOAD`.

    Args:
        url: of the server.
        engine: ``vllm`` or ``sglang``.
        folder: where it writes its traces, one per rank; its own.
        vocab: tokens to ask with.
        cpu: operators instead of kernels, under the tiny load.
        seconds: until the traces must be there.

    Returns:
        By kernel, without template arguments: microseconds and launches per MoE layer, the mean of the ranks.

    Raises:
        PlacementError: when no trace comes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(_traces(folder))
    asked = {"output_dir": str(folder), "activities": ["CPU" if cpu else "GPU"]} if engine == "sglang" else {}
    _post(f"{url}/start_profile", asked)
    drive(url, WORKLOADS["tiny"] if cpu else LOAD, vocab, 5)
    _post(f"{url}/stop_profile", {})
    end = time.monotonic() + seconds
    while True:
        found, events = sorted(set(_traces(folder)) - before), []
        try:
            events = [_events(path) for path in found]
        except (OSError, EOFError, ValueError):
            pass  # one is being written
        if events or time.monotonic() > end:
            break
        time.sleep(0.5)
    if not events:
        raise PlacementError(f"{url} wrote no trace into {folder} within {seconds:g} s")
    return per_layer(events, "cpu_op" if cpu else "kernel")


def per_layer(ranks: Sequence[Sequence[Mapping]], category: str) -> dict[str, list[float]]:
    """Microseconds and launches per MoE layer of each kernel.

    Args:
        ranks: the events of each rank's trace.
        category: of the events that count.
    """
    made: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for events in ranks:
        counted = [event for event in events if event.get("cat") == category]
        layers = max(1, sum(MOE_KERNEL in event["name"] for event in counted) / 2)
        for event in counted:
            of = made[short(event["name"])]
            of[0] += event["dur"] / layers / len(ranks)
            of[1] += 1 / layers / len(ranks)
    return dict(made)


def short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    name = re.sub(r"^void ", "", name.replace("(anonymous namespace)", ""))
    return re.split(r"[<(]", name, maxsplit=1)[0][:70] or name[:70]


def table(found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """The kernels in which servers differ most, and the sum of all.

    Args:
        found: server -> what `profile` returned; the first is what the others are compared with.
    """
    first = next(iter(found.values()))
    names = {name for kernels in found.values() for name in kernels}
    gap = {n: max(abs(k.get(n, [0.0])[0] - first.get(n, [0.0])[0]) for k in found.values()) for n in names}
    made = Table(title="kernels: microseconds (launches) per MoE layer, where servers differ most", title_justify="left", box=None)
    for column in ("kernel", *found):
        made.add_column(column, justify="left" if column == "kernel" else "right")
    for name in sorted(names, key=lambda n: (-gap[n], n))[:SHOWN]:
        made.add_row(name, *(f"{k[name][0]:.1f} ({k[name][1]:.1f})" if name in k else "" for k in found.values()))
    made.add_row("all", *(f"{sum(t for t, _ in k.values()):.1f} ({sum(n for _, n in k.values()):.1f})" for k in found.values()))
    return made


def _traces(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".json", ".json.gz"))]


def _events(path: Path) -> list[dict]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)["traceEvents"]


def _post(url: str, body: dict) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120):
        pass
