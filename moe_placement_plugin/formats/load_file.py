"""Read and write recorded loads: an `ExpertLoad` as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..core.errors import PlacementError
from ..core.load import ExpertLoad
from .atomic import read_bytes, write_atomically
from .kinds import Kind, kind_of
from .sglang import parse_sglang_load, read_torch_load

FORMAT = "moe-expert-load"
FORMAT_VERSION = 1


def read_load(path: str | Path) -> ExpertLoad:
    """Read a recorded load: ours (safetensors) or SGLang's (JSON, torch), told by the content.

    A ``.pt`` file is read with ``weights_only=True``, which runs no code; it needs torch.

    Raises:
        PlacementError: when the file is missing, foreign, truncated or holds no valid load.
    """
    return parse_load(read_bytes(path, "recorded load"), path)


def parse_load(content: bytes, path: str | Path) -> ExpertLoad:
    """Make a load of the ``content`` of ``path``; torch reads a ``.pt`` file by itself.

    Raises:
        PlacementError: naming the path, as `read_load`.
    """
    try:
        kind = kind_of(content)
        if kind is Kind.TORCH:
            return read_torch_load(path)
        if kind is Kind.JSON:
            return parse_sglang_load(content, path)
        return _parse_safetensors(content, path)
    except PlacementError as error:
        raise error if str(path) in str(error) else PlacementError(f"{path}: {error}") from None


def write_load(load: ExpertLoad, path: str | Path) -> None:
    """Write a load as safetensors, atomically.

    Raises:
        PlacementError: when the path cannot be written.
    """
    from safetensors.numpy import save

    tensors = {"counts": np.ascontiguousarray(load.counts)}
    if load.coactivation is not None:
        tensors["coactivation"] = np.ascontiguousarray(load.coactivation)
    header = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "layer_ids": json.dumps(load.layer_ids),
        "phases": json.dumps(load.phases),
        "metadata": json.dumps(dict(load.metadata)),
    }
    write_atomically(path, save(tensors, metadata=header))


def _parse_safetensors(content: bytes, path: str | Path) -> ExpertLoad:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise PlacementError(
            f"{path} is no recorded load ({type(error).__name__}: {error}): give a file written by "
            "--expert-load-record, or SGLang's .json or .pt"
        ) from None
    if header.get("format") != FORMAT or "counts" not in tensors:
        raise PlacementError(
            f"{path} is a safetensors file but no recorded load: give one written by "
            "--expert-load-record"
        )
    if header.get("version") != str(FORMAT_VERSION):
        raise PlacementError(
            f"{path} has load version {header.get('version')}, this release reads version "
            f"{FORMAT_VERSION}: record again"
        )
    return ExpertLoad(
        counts=tensors["counts"],
        layer_ids=tuple(json.loads(header["layer_ids"])),
        phases=tuple(json.loads(header["phases"])),
        coactivation=tensors.get("coactivation"),
        metadata=json.loads(header["metadata"]),
    )
