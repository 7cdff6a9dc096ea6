"""Write random checkpoints of which every expert tensor is unlike any other's.

So a slot tells which expert it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

HIDDEN = 64
"""Hidden size of every model of the zoo."""

WIDTH = 32
"""Intermediate size of every expert of the zoo."""

EXPERTS = 8
"""Routed experts of every MoE layer of the zoo."""


def seeded(name: str) -> np.random.Generator:
    """Return random numbers that depend on a name alone."""
    return np.random.default_rng(crc32(name.encode()))


def finite_float8(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the bytes of float8_e4m3fn numbers, uint8, all finite and none of them 0."""
    return (rng.integers(8, 120, shape) | rng.integers(0, 2, shape) << 7).astype(np.uint8)


@dataclass(frozen=True)
class Part:
    """Describe one of the tensors that make up an expert, as a checkpoint names it.

    Attributes:
        name: of the tensor, with ``{layer}`` and, unless one tensor holds all experts,
            ``{expert}``.
        parameter: the engine's parameter that it goes into, such as ``w13_weight``; empty for what
            is no content (a shape).
        shape: of one expert's share.
        dtype: as safetensors names it, or ``F32``.
        flat: all experts one below the other in dimension 0 (DBRX) instead of stacked.
        spread: standard deviation of the values; 0 draws bytes.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str = "F32"
    flat: bool = False
    spread: float = 0.15

    def of_expert(self, layer: int, expert: int) -> np.ndarray:
        """Return this expert's values, the same whenever asked."""
        rng = seeded(f"{self.name}|{layer}|{expert}")
        if self.dtype == "F32":
            values = rng.standard_normal(self.shape) * self.spread
            return (np.abs(values) + 1e-3 if self.positive else values).astype(np.float32)
        if self.dtype == "F8_E4M3":
            return finite_float8(rng, self.shape)
        if self.dtype == "SHAPE":
            return np.array(self.shape, dtype=np.int64)
        if self.dtype == "INDEX":  # of the group of each input, GPTQ's g_idx
            return np.arange(self.shape[0], dtype=np.int32) // 32
        if self.dtype in ("U8", "I8"):
            low, high = (100, 127) if self.positive else (1, 256)
            values = rng.integers(low, high, self.shape).astype(np.uint8)
            return values.view(np.int8) if self.dtype == "I8" else values
        return rng.integers(1, 2**31 - 1, self.shape).astype(np.int32)

    @property
    def positive(self) -> bool:
        """Return whether it holds scales."""
        return "scale" in self.parameter

    def tensors(self, layer: int, experts: int) -> dict[str, np.ndarray]:
        """Name -> tensor of one layer."""
        own = [self.of_expert(layer, expert) for expert in range(experts)]
        if "{expert}" in self.name:
            return {self.name.format(layer=layer, expert=e): own[e] for e in range(experts)}
        merged = np.concatenate(own) if self.flat else np.stack(own)
        return {self.name.format(layer=layer): merged}


def expert_tensors(
    parts: Iterable[Part], layers: Iterable[int], experts: int = EXPERTS
) -> dict[str, np.ndarray]:
    """Name -> tensor of all experts of a checkpoint."""
    layers = tuple(layers)
    return {
        name: tensor
        for part in parts
        for layer in layers
        for name, tensor in part.tensors(layer, experts).items()
    }


def expected_slot(parts: Iterable[Part], layer: int, expert: int) -> dict[str, np.ndarray]:
    """Return the values of the slot that holds this expert, by parameter.

    They come in no particular order: the engine may order as it likes.
    """
    values: dict[str, list[np.ndarray]] = {}
    for part in parts:
        if not part.parameter:
            continue
        values.setdefault(part.parameter, []).append(part.of_expert(layer, expert).ravel())
    return {parameter: np.concatenate(some) for parameter, some in values.items()}


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a checkpoint's directory with nothing but its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config)))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str]) -> None:
    """Write a safetensors file.

    ``dtypes`` names the tensors whose bytes are to be read as another type.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, blobs = 0, []
    names = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8", "int8": "I8"}
    for name, tensor in tensors.items():
        blob = np.ascontiguousarray(tensor).tobytes()
        header[name] = {
            "dtype": dtypes.get(name) or names[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(blob)],
        }
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)
