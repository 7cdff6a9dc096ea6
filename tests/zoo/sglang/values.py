"""Draw weights of which each tells layer, expert and tensor.

So a slot tells which expert it holds.

Nothing here knows the plugin or the engine: what a slot should hold is the checkpoint's own tensor,
made again.
"""

from __future__ import annotations

import numpy as np

from tests.zoo.checkpoint import seeded

HIDDEN, WIDTH, EXPERTS, LAYERS = 64, 64, 8, 3
"""Sizes that every model of the zoo has, unless its recipe says otherwise."""


def drawn(name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
    """Draw a float32 tensor that depends on its name and shape alone."""
    return (seeded(f"{name} {shape}").standard_normal(shape) * gain / np.sqrt(shape[-1])).astype(
        np.float32
    )


def expert(
    layer: int, number: int, tensor: str, width: int = WIDTH, hidden: int = HIDDEN
) -> np.ndarray:
    """Draw one expert's part of a layer.

    Args:
        layer: index among the model's layers.
        number: logical expert.
        tensor: ``w1`` (gate) or ``w3`` (up) ``[width, hidden]``, ``w2`` (down) ``[hidden, width]``,
            or their biases ``b1``, ``b3`` ``[width]`` and ``b2`` ``[hidden]``.
        width: the expert's intermediate size.
        hidden: the model's.
    """
    shapes = {"w1": (width, hidden), "w3": (width, hidden), "w2": (hidden, width)}
    shapes |= {"b1": (width,), "b3": (width,), "b2": (hidden,)}
    return drawn(f"layer {layer} expert {number} {tensor}", *shapes[tensor], gain=1.5)
