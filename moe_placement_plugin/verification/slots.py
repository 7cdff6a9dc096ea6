"""Find the tensors of an MoE layer that hold the experts' weights, one row for each slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..core.errors import PlacementError

_WRAPPERS = ("triton_kernels", "vllm.third_party.triton_kernels")
"""Packages whose tensors hold torch's as ``storage.data``."""

_DEPTH = 3
"""How deep to search: module -> quantisation method -> kernel -> its quantisation config."""


class Unverifiable(PlacementError):
    """Say that a kernel keeps its weights in a way that hides which bytes are which slot's."""


def expert_tensors(
    layer: Any, slots: int, experts: frozenset[int], ignore: frozenset[str], where: str
) -> dict[str, Any]:
    """Find every tensor of a layer that has one row for each of this rank's slots.

    Kernels re-pack weights after loading and keep some of what they made beside the module, so that
    its quantisation method is searched too. Tensors without an expert dimension (a scale that all
    experts share) are left out.

    Args:
        layer: the engine's module of expert weights.
        slots: physical slots of this rank in this layer, fused shared experts included.
        experts: numbers of rows that a tensor would have if it counted all experts, logical or
            physical.
        ignore: names that are no expert weights (maps, the router's bias).
        where: the layer's name for messages.

    Returns:
        name -> tensor ``[slots, ...]``, each stretch of memory once.

    Raises:
        PlacementError: when a tensor counts all experts instead of this rank's slots, its rows
            differ, and so a kernel that reads it by local slot takes other experts' values (SGLang
            PR 8398).
        Unverifiable: when no expert weights are found.
    """
    found: dict[str, Any] = {}
    stretches: list[tuple[int, int]] = []
    for name, tensor in _tensors(layer, ignore):
        if tensor.dim() == 0 or tensor.numel() == 0:
            continue
        rows = tensor.shape[0]
        if rows != slots and rows in experts and name.rpartition(".")[2] not in ignore:
            if not bool((tensor == tensor[:1]).all()):
                raise PlacementError(
                    f"{where}: {name} has {rows} rows, one for every expert of the model, where "
                    f"this rank has {slots} slots: its kernel would read other experts' values by "
                    "local slot; use another quantisation or kernel, or leave the placement flag "
                    "out"
                )
            continue
        if rows != slots or not _by_slot(tensor):
            continue
        first, last = _stretch(tensor)
        # A view of what was found already, such as a scale in the order that a kernel wants it.
        if not any(begin <= first and last <= end for begin, end in stretches):
            stretches.append((first, last))
            found[name] = tensor
    if not any(tensor.dim() >= 2 and "bias" not in name for name, tensor in found.items()):
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(layer, ignore)}
        raise Unverifiable(
            f"{where}: none of its tensors has a row for each of the {slots} slots ({shapes}), so "
            "that the weights cannot be verified: serve with --expert-placement-verify off, and "
            "report this kernel"
        )
    return found


def _stretch(tensor: Any) -> tuple[int, int]:
    """Give the addresses of a tensor's first byte and of the one behind its last."""
    elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _by_slot(tensor: Any) -> bool:
    """Tell whether rows lie one behind the other; else there are so many of them by accident."""
    return (
        all(n == 1 or s <= tensor.stride(0) for n, s in zip(tensor.shape[1:], tensor.stride()[1:]))
        or tensor.shape[0] == 1
    )


def _unwrapped(value: Any) -> Any:
    """Take torch's tensor out of one of triton_kernels' (MXFP4); return any other value itself."""
    if type(value).__module__.startswith(_WRAPPERS):
        inner = getattr(getattr(value, "storage", None), "data", None)
        return value if inner is None else inner
    return value


def _tensors(layer: Any, ignore: frozenset[str]) -> Iterator[tuple[str, Any]]:
    import torch

    # Some kernels leave what they made as a plain attribute (SGLang's hpc_ops scales).
    plain = ((name, _unwrapped(value)) for name, value in sorted(vars(layer).items()))
    plain = ((name, value) for name, value in plain if isinstance(value, torch.Tensor))
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers(), *plain):
        if name.rpartition(".")[2] not in ignore:
            yield name, tensor
    method = getattr(layer, "quant_method", None)
    if method is not None:
        yield from _attributes(method, "quant_method", _DEPTH, set(), ignore)


def _attributes(
    owner: Any, path: str, depth: int, seen: set[int], ignore: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    import torch

    # SGLang's quantisation methods are modules themselves; other modules that they name are not the
    # layer's own.
    if (
        id(owner) in seen
        or not hasattr(owner, "__dict__")
        or (isinstance(owner, torch.nn.Module) and depth < _DEPTH)
    ):
        return
    seen.add(id(owner))
    for name, value in sorted(vars(owner).items()):
        value = _unwrapped(value)
        if isinstance(value, torch.Tensor):
            if name not in ignore:
                yield f"{path}.{name}", value
        elif (
            depth
            and type(value).__module__.split(".")[0] in ("vllm", "sglang", "triton_kernels")
            and not isinstance(value, type)
        ):
            yield from _attributes(value, f"{path}.{name}", depth - 1, seen, ignore)
