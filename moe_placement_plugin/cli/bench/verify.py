"""Offer ``moe-placement bench verify``: what fingerprints of weights cost."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import JsonPath

HELP = (
    "Time the fingerprints of expert weights against one read of the same bytes (CPU) or a copy "
    "(GPU).\n\n"
    "Example: moe-placement bench verify --gb 2"
)


def bench_verify(
    gigabytes: Annotated[
        float, typer.Option("--gb", help="Size of the expert weights in 10^9 bytes.", min=0.001)
    ] = 2.0,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda.")] = "cpu",
    json_path: JsonPath = None,
) -> None:
    """Run ``bench verify``: measure, print, write."""
    import json

    from ...formats.atomic import write_atomically  # lazy: heavy
    from ...lab.bench.fingerprint.run import describe, measure  # lazy: numba

    result = measure(gigabytes, device)
    print(describe(result))
    if json_path:
        write_atomically(json_path, json.dumps(result, indent=1).encode())
