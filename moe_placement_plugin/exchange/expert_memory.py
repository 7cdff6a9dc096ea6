"""See the weights of an engine's experts as rows of bytes, whatever their types and strides."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..core.errors import PlacementError
from ..core.placement import Placement

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Staged parameters begin at a multiple of so many bytes: any dtype can view them."""


@dataclass(frozen=True)
class Parameter:
    """See one parameter of a layer's experts.

    Attributes:
        rows: uint8 ``[slots, bytes of one expert]``, a view of the engine's own memory.
        shape, stride, dtype: of one expert's part, stride in elements.
    """

    rows: torch.Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    _views: dict[torch.dtype, list[torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @cached_property
    def bytes(self) -> int:
        """Return the bytes of one expert."""
        return self.rows.shape[1]

    @cached_property
    def padded(self) -> int:
        """Return `bytes` up to the next multiple of `ALIGNMENT`."""
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT

    def units(self, unit: torch.dtype) -> list[torch.Tensor]:
        """Return each slot's bytes, read as numbers of a type (`widest_unit`)."""
        if unit not in self._views:
            self._views[unit] = list(self.rows.view(unit).unbind(0))
        return self._views[unit]

    def block(self, unit: torch.dtype, first: int, number: int) -> torch.Tensor:
        """Return the bytes of experts that lie one behind the other, ``[number, units]``.

        ``[units]`` of a single one, which has its view already.
        """
        return (
            self.units(unit)[first] if number == 1 else self.rows[first : first + number].view(unit)
        )

    def typed(self, row: torch.Tensor) -> torch.Tensor:
        """Return one expert's bytes as a tensor of the parameter's type, shape and strides."""
        return row.view(self.dtype).as_strided(self.shape, self.stride)


def view_parameter(tensor: torch.Tensor, name: str) -> Parameter:
    """See a tensor ``[slots, ...]`` as rows of bytes, without a copy.

    Raises:
        PlacementError: when the elements of one expert are not one block of memory.
    """
    import torch

    if tensor.dim() == 0:
        raise PlacementError(
            f"{name} is a single number: give tensors whose first dimension is the rank's slots"
        )
    tensor = tensor.detach()
    shape = tuple(tensor.shape[1:])
    # A dimension of one element may have any stride: ranks whose tensors are alike must not differ
    # by it.
    stride = tuple(step if extent > 1 else 1 for extent, step in zip(shape, tensor.stride()[1:]))
    size = 1
    for extent in shape:
        size *= extent
    dense = 1
    for extent, step in sorted(zip(shape, stride), key=lambda p: (p[1], p[0])):
        if extent > 1 and step != dense:
            raise PlacementError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}: "
                "the elements of one expert must be one block of memory; make the tensor "
                "contiguous before it is registered"
            )
        dense *= extent
    if tensor.shape[0] > 1 and tensor.stride(0) < size:
        raise PlacementError(
            f"{name} has strides {tuple(tensor.stride())}: its slots overlap in memory; give each "
            "its own"
        )
    flat = tensor.as_strided((tensor.shape[0], size), (max(tensor.stride(0), 1), 1))
    return Parameter(
        flat.view(torch.uint8) if flat.dtype != torch.uint8 else flat, shape, stride, tensor.dtype
    )


def view_weights(
    weights: Mapping[int, Sequence[torch.Tensor | Parameter]]
    | Sequence[Sequence[torch.Tensor | Parameter]],
    old: Placement,
    new: Placement,
    rank: int,
) -> list[list[Parameter]]:
    """Return all parameters of all layers, rows in the placement's order.

    Args:
        weights: this rank's tensors ``[slots, ...]`` of each layer: by index of the layer within
            the model (SGLang), or a list in the order of the placement's rows (vLLM). Parameters
            are taken as they are: viewing costs some 10 us for each tensor.
        old, new: the placements of the exchange.
        rank: this EP rank.

    Raises:
        PlacementError: when layers or slots do not fit the placements, or a tensor cannot be seen
            as rows.
    """
    if isinstance(weights, Mapping):
        missing = [layer for layer in new.layer_ids if layer not in weights]
        if missing:
            raise PlacementError(
                f"weights of layer {missing[0]} are not given: give those of all {new.num_layers} "
                "layers of the placement"
            )
        rows = [weights[layer] for layer in new.layer_ids]
    else:
        rows = list(weights)
        if len(rows) != new.num_layers:
            raise PlacementError(
                f"weights of {len(rows)} layers for a placement of {new.num_layers}: give one "
                "list of tensors per layer"
            )
    slots = max(old.slots_per_rank[rank], new.slots_per_rank[rank])
    result = []
    for layer, tensors in zip(new.layer_ids, rows):
        parameters = [
            t if isinstance(t, Parameter) else view_parameter(t, f"layer {layer}, tensor {k}")
            for k, t in enumerate(tensors)
        ]
        for k, parameter in enumerate(parameters):
            if parameter.rows.shape[0] < slots:
                raise PlacementError(
                    f"layer {layer}, tensor {k} has {parameter.rows.shape[0]} slots, the "
                    f"placement gives rank {rank} {slots}: the first dimension must be the rank's "
                    "slots"
                )
        result.append(parameters)
    devices = {p.rows.device for parameters in result for p in parameters}
    if len(devices) > 1:
        raise PlacementError(
            f"weights lie on {sorted(map(str, devices))}: the experts of a rank must be on one "
            "device"
        )
    return result


def widest_unit(layers: Sequence[Sequence[Parameter]]) -> torch.dtype:
    """Return the widest type that the bytes of all parameters can be read as.

    Copies of many rows at once go as fast as their type is wide.
    """
    import torch

    for unit in (torch.int64, torch.int32, torch.int16):
        width = unit.itemsize
        if all(
            number % width == 0
            for parameters in layers
            for p in parameters
            for number in (p.bytes, p.rows.stride(0), p.rows.data_ptr())
        ):
            return unit
    return torch.uint8


class LocalExperts:
    """Holds one rank's experts of an exchange's layers, as rows of bytes.

    Args:
        layers: parameters of each row's layer.
        rank: the EP rank.
        also: parameters of other ranks that lie in this process's address space too.

    Attributes:
        device: where they lie.
        unit: the type that rows are copied as.
        bytes, padded: of one expert of each row's layer, and as it is staged.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Parameter]],
        rank: int,
        also: Sequence[Sequence[Parameter]] = (),
    ):
        import torch

        self.layers, self.rank = layers, rank
        devices = (p.rows.device for parameters in layers for p in parameters)
        self.device = next(devices, torch.device("cpu"))
        self.unit = widest_unit([*layers, *also])
        self.bytes = [sum(p.bytes for p in parameters) for parameters in layers]
        self.padded = padded_bytes(layers)

    def slot(self, row: int, slot: int) -> list[torch.Tensor]:
        """Return one expert's bytes, parameter by parameter, in units."""
        return [p.units(self.unit)[slot] for p in self.layers[row] if p.bytes]

    def in_units(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return rows of bytes, one for each parameter of an expert, as `slot` does."""
        return [row.view(self.unit) for row in rows if row.numel()]

    def parts(self, row: int) -> list[tuple[int, bool]]:
        """Return an expert as it is staged: (length in units, whether it is no padding)."""
        width, found = self.unit.itemsize, []
        for parameter in self.layers[row]:
            if parameter.bytes:
                found.append((parameter.bytes // width, True))
            if parameter.padded > parameter.bytes:
                found.append(((parameter.padded - parameter.bytes) // width, False))
        return found


def copy_rows(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to its target, all in a few launches; no target may be a source."""
    import torch

    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def padded_bytes(layers: Sequence[Sequence[Parameter]]) -> list[int]:
    """Return the staging bytes of one expert of each layer."""
    return [sum(p.padded for p in parameters) for parameters in layers]


def layout_digest(layers: Sequence[Sequence[Parameter]]) -> str:
    """Return a hex SHA-256 of types, shapes and strides.

    Ranks whose digests differ cannot send each other bytes.
    """
    facts: list[Any] = [
        [[str(p.dtype), p.shape, p.stride] for p in parameters] for parameters in layers
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
