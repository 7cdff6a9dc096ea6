"""Find who multiplies: the installed engine's Triton kernels, or torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ....core.errors import PlacementError
from .base import Matmuls

NAMES = ("auto", "vllm", "sglang", "torch", "dense")


def find_matmuls(name: str = "auto", device: torch.device | str = "cpu") -> Matmuls:
    """Return matmuls by name; their ``name`` says what was found.

    Args:
        name: ``vllm`` or ``sglang``: the engine's kernels, on CPU under the Triton interpreter
            (``TRITON_INTERPRET=1``); ``torch``; ``dense``: every expert computes every token;
            ``auto``: on CUDA the engine that is installed, else torch.
        device: where they are to run.

    Raises:
        PlacementError: when the engine is missing, differs from what this package knows, or cannot
            run there.
    """
    device = torch.device(device)
    if name not in NAMES:
        raise PlacementError(f"matmuls {name!r}: choose from {', '.join(NAMES)}")
    if name == "auto":
        engines = [e for e in ("vllm", "sglang") if find_spec(e)] if device.type == "cuda" else []
        name = engines[0] if engines else "torch"
    if name in ("torch", "dense"):
        from .torch_matmuls import DenseMatmuls, TorchMatmuls  # lazy: heavy

        return TorchMatmuls() if name == "torch" else DenseMatmuls()
    if find_spec(name) is None or find_spec("triton") is None:
        missing = name if find_spec(name) is None else "triton"
        raise PlacementError(
            f"{name}'s kernels: {missing} is not installed in this environment; install it, or "
            "choose torch"
        )
    from .engine import check_mode  # lazy: heavy

    interpreted = check_mode(name, device)
    if name == "vllm":
        from .vllm_matmuls import VllmMatmuls  # lazy: heavy

        return VllmMatmuls(interpreted)
    from .sglang_matmuls import SglangMatmuls  # lazy: heavy

    return SglangMatmuls(interpreted)
