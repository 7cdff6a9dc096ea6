"""Read single experts from a safetensors checkpoint: what no live rank holds any more.

Where an expert lies in the checkpoint and how its tensors become the engine's is the caller's to
say (each engine has its own mapping); `hugging_face_experts` and `fill_gate_up_down` do it for the
usual layouts of unquantized models.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..core.errors import PlacementError
from ..formats.atomic import read_json

if TYPE_CHECKING:
    import torch

PROJECTIONS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}
"""Role -> names in Hugging Face checkpoints (Mixtral's are the second)."""


_READ_AHEAD = 128 * 1024


@dataclass(frozen=True)
class Source:
    """Say where a tensor of an expert lies.

    Attributes:
        name: of the tensor in the checkpoint.
        index: along its first dimension, for tensors that hold all experts of a layer; None for the
            whole tensor.
    """

    name: str
    index: int | None = None


class Checkpoint:
    """Read the tensors of a local safetensors checkpoint one by one.

    Args:
        path: directory of a model (one file, or several with their ``*.safetensors.index.json``),
            or one safetensors file.

    Attributes:
        bytes_read: of all tensors read so far.

    Raises:
        PlacementError: when there is no such checkpoint.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self._file_of = self._find()

    def _find(self) -> dict[str, Path]:
        if self.path.is_file():
            return dict.fromkeys(self._file(self.path).keys(), self.path)
        indexes = sorted(self.path.glob("*.safetensors.index.json"))
        if indexes:
            data = read_json(indexes[0], "safetensors index")
            weight_map = data.get("weight_map") if isinstance(data, dict) else None
            if not isinstance(weight_map, dict):
                raise PlacementError(
                    f"{indexes[0]} has no weight_map: give a checkpoint as transformers writes it"
                )
            return {name: self.path / file for name, file in weight_map.items()}
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise PlacementError(
                f"{self.path} holds no safetensors files: give the local directory of the model "
                "that is served"
            )
        return {name: file for file in files for name in self._file(file).keys()}

    def _file(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise PlacementError(
                    f"{file} cannot be read ({error}): give a complete checkpoint"
                ) from None
        return self._open[file]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        return tuple(self._file_of)

    def read(self, source: Source) -> torch.Tensor:
        """Return one tensor, or one expert's part of it.

        Raises:
            PlacementError: when the checkpoint has no such tensor or part.
        """
        from safetensors import SafetensorError

        file = self._file_of.get(source.name)
        try:
            if file is None:
                raise KeyError(source.name)
            if source.index is None:
                tensor = self._file(file).get_tensor(source.name)
            else:
                part = self._file(file).get_slice(source.name)
                count = part.get_shape()[0]
                if not 0 <= source.index < count:
                    raise PlacementError(
                        f"{source.name} in {self.path} holds {count} experts, expert "
                        f"{source.index} is asked for: give the checkpoint of the model that is "
                        "served"
                    )
                tensor = part[source.index : source.index + 1][0]
        except (KeyError, SafetensorError):
            raise PlacementError(
                f"{self.path} has no tensor {source.name}: give the checkpoint of the model that "
                "is served, or a mapping of its names"
            ) from None
        self.bytes_read += tensor.nbytes
        return tensor

    def prefetch(self, sources: Iterable[Source]) -> None:
        """Have the system read what is needed soon, without waiting for it.

        Tensors are mapped: a disk that is asked for one page after the other gives a tenth of its
        bandwidth. What cannot be found is left to `read`, which says so.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[Source]] = {}
        for source in sources:
            if source.name in self._file_of:
                by_file.setdefault(self._file_of[source.name], []).append(source)
        for file, wanted in by_file.items():
            with suppress(OSError, ValueError, KeyError), file.open("rb") as opened:
                tensors, start = self._header(file, opened)
                for source in wanted:
                    begin, end = tensors[source.name]["data_offsets"]
                    if source.index is not None:
                        size = (end - begin) // tensors[source.name]["shape"][0]
                        begin, end = begin + source.index * size, begin + (source.index + 1) * size
                    # The kernel cuts a longer request to what it reads ahead at once.
                    for at in range(start + begin, start + end, _READ_AHEAD):
                        os.posix_fadvise(
                            opened.fileno(),
                            at,
                            min(_READ_AHEAD, start + end - at),
                            os.POSIX_FADV_WILLNEED,
                        )

    def _header(self, file: Path, opened: BinaryIO) -> tuple[dict[str, Any], int]:
        """Return what a file's header says of each tensor, and where the data begin."""
        if file not in self._headers:
            size = int.from_bytes(opened.read(8), "little")
            self._headers[file] = json.loads(opened.read(size)), 8 + size
        return self._headers[file]


class ExpertReader(Protocol):
    """Reads an expert that no live rank holds; `CheckpointReader` is one.

    One that is quicker with several at once has also ``read_all(wanted)``, which takes a list of
    `read`'s arguments; one that can have the disk begin early has ``prefetch(experts)``, which
    takes all pairs (layer, expert) of an exchange as it begins.
    """

    def read(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Fill the memory of one slot; return the bytes read.

        Args:
            layer, expert: what is wanted.
            out: one tensor for each tensor of the layer, of the shape of one slot.
        """
        ...


class CheckpointReader:
    """Reads whole experts, as `ExpertReader` asks.

    Args:
        checkpoint: where from.
        locate: (layer, expert) -> {role: source}.
        fill: ({role: tensor}, the engine's tensors of one slot): copies the one into the other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        locate: Callable[[int, int], Mapping[str, Source]],
        fill: Callable[[Mapping[str, torch.Tensor], Sequence[torch.Tensor]], None] | None = None,
    ):
        self._checkpoint, self._locate, self._fill = checkpoint, locate, fill or fill_gate_up_down

    def prefetch(self, experts: Iterable[tuple[int, int]]) -> None:
        """Have the disk begin with (layer, expert) that `read` will be asked for soon."""
        self._checkpoint.prefetch(
            source for layer, expert in experts for source in self._locate(layer, expert).values()
        )

    def read(self, layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
        """Fill ``out`` with an expert of the model's layer ``layer``; return the bytes read.

        Raises:
            PlacementError: when the checkpoint lacks it, or it does not fit.
        """
        before = self._checkpoint.bytes_read
        found = {
            role: self._checkpoint.read(source)
            for role, source in self._locate(layer, expert).items()
        }
        try:
            self._fill(found, out)
        except PlacementError as error:
            raise PlacementError(
                f"layer {layer}, expert {expert} of {self._checkpoint.path}: {error}"
            ) from None
        return self._checkpoint.bytes_read - before


def hugging_face_experts(checkpoint: Checkpoint) -> Callable[[int, int], Mapping[str, Source]]:
    """Find out from its names how experts are named in a Hugging Face checkpoint.

    Known are one tensor per expert and projection (``...layers.3.mlp.experts.7.gate_proj.weight``,
    Mixtral's ``w1``, ``w3``, ``w2``) and one tensor per layer for all experts
    (``...layers.3.mlp.experts.gate_up_proj``, ``.down_proj``).

    Returns:
        (layer, expert) -> sources of ``gate``, ``up`` and ``down``, or of ``gate_up`` and ``down``.

    Raises:
        PlacementError: when no tensor is named like that.
    """
    single = re.compile(r"^(.*\blayers\.)\d+(\..*\bexperts\.)\d+\.(gate_proj|w1)\.weight$")
    fused = re.compile(r"^(.*\blayers\.)\d+(\..*\bexperts\.)gate_up_proj(\.weight)?$")
    for name in checkpoint.names:
        if found := single.match(name):
            before, between, gate = found.groups()
            return partial(_single, before, between, PROJECTIONS["gate"].index(gate))
        if found := fused.match(name):
            return partial(_fused, found.group(1), found.group(2), found.group(3) or "")
    raise PlacementError(
        f"{checkpoint.path} names no experts in a known way "
        "(layers.N.*.experts.E.gate_proj.weight, .w1.weight or experts.gate_up_proj): give a "
        "mapping of its names"
    )


def _single(before: str, between: str, which: int, layer: int, expert: int) -> Mapping[str, Source]:
    return {
        role: Source(f"{before}{layer}{between}{expert}.{names[which]}.weight")
        for role, names in PROJECTIONS.items()
    }


def _fused(before: str, between: str, suffix: str, layer: int, expert: int) -> Mapping[str, Source]:
    return {
        name: Source(f"{before}{layer}{between}{name}_proj{suffix}", expert)
        for name in ("gate_up", "down")
    }


def fill_gate_up_down(found: Mapping[str, torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Fill the two tensors that both engines keep of an unquantized expert.

    They are gate above up ``[2 * width, hidden]``, and down ``[hidden, width]``. A fused tensor may
    be stored transposed; which it is follows from the shapes.

    Raises:
        PlacementError: when types or shapes do not fit, or a square tensor leaves open whether it
            is transposed.
    """
    if len(out) != 2:
        raise PlacementError(
            f"{len(out)} tensors per expert: gate, up and down fill two; give a mapping of your "
            "own (quantized experts have scales)"
        )
    first, down = out
    if "gate_up" in found:
        _fill(first, found["gate_up"], "gate_up", fused=True)
        _fill(down, found["down"], "down", fused=True)
        return
    width = found["gate"].shape[0]
    if first.shape[0] != 2 * width:
        raise PlacementError(
            f"gate has shape {tuple(found['gate'].shape)}, the engine keeps gate and up as "
            f"{tuple(first.shape)}: they do not fit"
        )
    _fill(first[:width], found["gate"], "gate")
    _fill(first[width:], found["up"], "up")
    _fill(down, found["down"], "down")


def _fill(target: torch.Tensor, tensor: torch.Tensor, role: str, fused: bool = False) -> None:
    import torch

    plain = (torch.float32, torch.bfloat16, torch.float16)
    if tensor.dtype != target.dtype and not (tensor.dtype in plain and target.dtype in plain):
        raise PlacementError(
            f"{role} is {tensor.dtype}, the engine keeps {target.dtype}: give a mapping that "
            "converts them as the engine does"
        )
    if (
        fused
        and tensor.dim() == 2
        and tensor.shape[0] == tensor.shape[1]
        and tuple(target.shape) == tuple(tensor.shape)
    ):
        raise PlacementError(
            f"{role} is square ({tensor.shape[0]} x {tensor.shape[1]}): whether it is stored "
            "transposed cannot be told; give a mapping"
        )
    if fused and tuple(tensor.shape) != tuple(target.shape):
        tensor = tensor.mT
    if tuple(tensor.shape) != tuple(target.shape):
        raise PlacementError(
            f"{role} has shape {tuple(tensor.shape)}, the engine keeps {tuple(target.shape)}: the "
            "checkpoint is of another model"
        )
    target.copy_(tensor)
