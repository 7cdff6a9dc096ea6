"""Compute digests of slots, on the device where the weights are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.errors import PlacementError
from .definition import BLOCK, KEYS, multipliers, salt

_CHUNK = 64 * BLOCK
"""Words at a time on devices without a kernel of their own: 2 MiB of 64-bit products."""


def slot_bytes(tensor: Any) -> Any:
    """Give the bytes of each slot as they lie in memory, uint8 ``[slots, bytes]``.

    A view where that can be had.

    Args:
        tensor: torch tensor ``[slots, ...]``. A slot whose elements fill one stretch of memory in
            any order (a transposed weight) is read in that order; one with gaps is copied in
            logical order.
    """
    import torch

    slots = tensor.shape[0]
    tensor = tensor.detach()
    if not tensor.is_contiguous() and tensor.numel():
        inner = sorted(range(1, tensor.dim()), key=lambda d: (-tensor.stride(d), -tensor.shape[d]))
        tensor = tensor.permute(0, *inner)
    if not tensor.numel():
        return torch.empty((slots, 0), dtype=torch.uint8)
    return tensor.contiguous().reshape(slots, -1).view(torch.uint8)


def tensor_digests(tensor: Any, threads: int | None = None) -> np.ndarray:
    """Compute the digest of every slot of one tensor.

    Args:
        tensor: torch tensor ``[slots, ...]`` on any device.
        threads: CPU threads; torch's own number by default.

    Returns:
        uint64 ``[slots]``, equal to `definition.reference` over each slot's bytes on every device.
    """
    import torch

    data = slot_bytes(tensor)
    if data.device.type == "cpu":
        # Not at the top: vLLM 0.32's CPU build looks through all modules when a worker starts, and
        # falls over numba's.
        from . import digests_cpu  # lazy: numba

        return digests_cpu.digests(
            data.numpy(), torch.get_num_threads() if threads is None else threads
        )
    digests: np.ndarray = _device_digests(data).cpu().numpy()
    return digests.view(np.uint64)


def _device_digests(data: Any) -> Any:
    if data.device.type == "cuda":  # ROCm calls itself so too
        try:
            from . import digests_gpu  # lazy: heavy
        except ImportError:
            return torch_digests(data)
        return digests_gpu.digests(data)
    return torch_digests(data)


def torch_digests(data: Any) -> Any:
    """Compute the digests in torch's own operators, for devices without a kernel.

    Args:
        data: uint8 ``[slots, bytes]``.

    Returns:
        int64 ``[slots]``, the digests' bits.
    """
    import torch

    slots, size = data.shape
    if not size:
        return torch.zeros(slots, dtype=torch.int64, device=data.device)
    if size % 4:
        data = torch.nn.functional.pad(data, (0, 4 - size % 4))
    words = data.contiguous().view(torch.int32)
    blocks = -(-words.shape[1] // BLOCK)
    factors = torch.from_numpy(multipliers(blocks).view(np.int64)).to(data.device)
    keys = torch.from_numpy(KEYS.astype(np.int64)).to(data.device)
    total = torch.zeros(slots, dtype=torch.int64, device=data.device)
    for first in range(0, words.shape[1], _CHUNK):
        part = words[:, first : first + _CHUNK].to(torch.int64) & 0xFFFFFFFF
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % BLOCK)).view(slots, -1, BLOCK)
        begin = first // BLOCK
        total += ((part * keys).sum(2) * factors[begin : begin + part.shape[1]]).sum(1)
    return total


def layer_digests(
    tensors: dict[str, Any], threads: int | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Compute the digests of every slot of a layer, one for each of its tensors.

    Args:
        tensors: name -> torch tensor ``[slots, ...]``; all with the same number of slots.
        threads: CPU threads; torch's own number by default.

    Returns:
        (names in order, uint64 ``[slots, tensors]``). A digest depends on its tensor's name, shape
        and type too.

    Raises:
        PlacementError: when the tensors differ in their number of slots.
    """
    names = tuple(sorted(tensors))
    slots = {name: tensors[name].shape[0] for name in names}
    if len(set(slots.values())) > 1:
        raise PlacementError(f"the tensors of one layer have different numbers of slots: {slots}")
    columns = []
    for name in names:
        tensor = tensors[name]
        column = tensor_digests(tensor, threads)
        columns.append(column + np.uint64(salt(name, tuple(tensor.shape[1:]), str(tensor.dtype))))
    return names, np.stack(columns, axis=1) if columns else np.zeros((0, 0), dtype=np.uint64)
