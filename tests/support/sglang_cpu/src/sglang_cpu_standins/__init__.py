"""Lend torch and torchvision what SGLang's CPU engine needs of them.

A CPU-only test machine does not have it.

`install` runs at the end of `import torch` (entry point group ``torch.backends``), so in every
process, spawned ones included, before anything of SGLang is imported. Nothing here computes: it
only makes imports succeed and gives a name to an operation that has no meaning on a CPU.
"""

from __future__ import annotations

import os

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch drops an operator when the Library object that defined it is collected.
_library = None


def install() -> None:
    """Define the operators and functions that are missing; a second call changes nothing."""
    _define_torchvision_operators()
    _define_cpu_empty_cache()
    _hide_nccl()


def _define_torchvision_operators() -> None:
    """Define operators of torchvision, whose compiled part cannot load beside CPU torch.

    On PyPI it is a CUDA build.

    Its Python part registers fake kernels for two operators when it is imported and fails if they
    do not exist. Beside PyPI's CUDA build of torch its compiled part loads, and ends the process if
    they exist already.
    """
    global _library
    import torch

    if torch.version.cuda or _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        _library.define(schema)


def _define_cpu_empty_cache() -> None:
    """Give ``torch.cpu`` the ``empty_cache`` that SGLang's EPLB calls; it caches nothing.

    It is what ``torch.get_device_module().empty_cache()`` calls.
    """
    import torch

    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = lambda: None


def _hide_nccl() -> None:
    """Hide NCCL, which PyPI's torch brings and SGLang takes for a sign of GPUs.

    Without the library it goes on by gloo.
    """
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", os.devnull)
