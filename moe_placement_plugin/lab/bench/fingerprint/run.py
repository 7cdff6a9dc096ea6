"""Measure what fingerprints cost.

The digest of a model's experts is compared with one read (CPU) or one copy (GPU) of the same bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ....core.errors import PlacementError
from ....verification import definition
from ....verification.digests import tensor_digests
from ..planner.run import machine

if TYPE_CHECKING:
    import torch

REPEATS = 5


def measure(gigabytes: float, device: str, slots: int = 64) -> dict[str, Any]:
    """Time the digest of all slots, and a read of the bytes, in turn.

    Args:
        gigabytes: size of the weights, 10^9 bytes.
        device: ``cpu`` or a torch device of a GPU.
        slots: physical experts that the weights are split into; as in a server, each has two
            tensors.

    Returns:
        Plain data: machine, versions, seconds (median and all) of digest and read, their ratio,
        GB/s.

    Raises:
        PlacementError: for a device that is not there or too small.
    """
    import torch

    weights = _weights(gigabytes, device, slots)
    num_bytes = sum(tensor.numel() * 8 for tensor in weights)

    def digest() -> np.ndarray:
        return np.stack([tensor_digests(tensor) for tensor in weights])

    row = weights[1][slots // 2].cpu().numpy()
    if int(digest()[1, slots // 2]) != definition.reference(row):
        raise PlacementError(
            "the digest on this device differs from its definition: "
            "report the device and the versions"
        )
    other = _read_or_copy(weights, device)
    other()
    digests, reads = [], []
    for _ in range(REPEATS):
        digests.append(_timed(digest, device))
        reads.append(_timed(other, device))
    cost, read = statistics.median(digests), statistics.median(reads)
    # A copy reads and writes every byte.
    traffic = num_bytes if device == "cpu" else 2 * num_bytes
    return {
        "machine": machine()
        if device == "cpu"
        else {**machine(), "gpu": torch.cuda.get_device_name()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "threads": torch.get_num_threads(),
        "device": device,
        "bytes": num_bytes,
        "slots": slots,
        "digest_s": digests,
        "other": "read (sum of 64-bit words)" if device == "cpu" else "copy on the device",
        "other_s": reads,
        "digest_gb_per_s": num_bytes / 1e9 / cost,
        "other_gb_per_s": traffic / 1e9 / read,
        "ratio": cost / read if device == "cpu" else (num_bytes / cost) / (traffic / read),
    }


def _weights(gigabytes: float, device: str, slots: int) -> list[torch.Tensor]:
    """Make two tensors of random 64-bit words, ``[slots, words]`` each.

    Raises:
        PlacementError: for a device that is not there, or a size of less than a word a slot.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise PlacementError(
            f"--device {device}: torch {torch.__version__} sees no GPU here; use --device cpu"
        )
    words = int(gigabytes * 1e9) // 2 // 8 // slots
    if words < 1:
        raise PlacementError(
            f"--gb {gigabytes}: less than a word for each of {slots} slots; use a larger size"
        )
    return [torch.randint(0, 2**62, (slots, words), device=device) for _ in range(2)]


def _read_or_copy(weights: list[torch.Tensor], device: str) -> Callable[[], object]:
    """Return what the digest is compared with: a read on the CPU, a copy on a GPU."""
    import torch

    def read() -> object:
        return [tensor.sum() for tensor in weights]

    if device == "cpu":
        return read
    target = torch.empty_like(weights[0])

    def copy() -> None:
        for tensor in weights:
            target.copy_(tensor)

    return copy


def _timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that some work takes on a device."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def describe(result: dict[str, Any]) -> str:
    """Describe the measurement in a few lines."""
    cpu = result["device"] == "cpu"

    def row(name: str, seconds: list[float], rate: float) -> str:
        cost, least, most = (f(seconds) * 1e3 for f in (statistics.median, min, max))
        return f"{name:8}{cost:8.1f} ms  {rate:7.1f} GB/s  ({least:.1f} to {most:.1f})"

    facts = {**result["machine"], **result["versions"], "threads": result["threads"]}
    ratio = (
        f"the digest takes {result['ratio']:.2f} times as long as one read of the bytes"
        if cpu
        else f"the digest reads at {result['ratio']:.0%} of copy bandwidth "
        "(reads and writes counted)"
    )
    lines = [
        ", ".join(f"{key} {value}" for key, value in facts.items()),
        f"{result['bytes'] / 1e9:.2f} GB in {result['slots']} slots on {result['device']}, "
        f"medians of {len(result['digest_s'])} turns A B A B",
        row("digest", result["digest_s"], result["digest_gb_per_s"]),
        row("read" if cpu else "copy", result["other_s"], result["other_gb_per_s"]),
        ratio,
    ]
    return "\n".join(lines)
