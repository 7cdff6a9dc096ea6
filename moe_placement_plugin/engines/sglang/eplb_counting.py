"""Count what SGLang's EPLB counts in every layer, in one kernel on a GPU.

SGLang takes seven: a mask, three casts, two fills and a scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...recording.counters import kernel
from .hook_registry import Hook

_GATHERER = "sglang.srt.eplb.expert_distribution:_SelectExpertsSinglePassGatherer"

DEVICES = ("cuda",)
"""Types of device on which Triton's kernel takes the place of SGLang's operators.

AMD's GPUs are called so too.
"""


def select_experts(original: Callable, self: Any, layer_idx: int, topk_ids: Any) -> None:
    """Count a layer's choices in one kernel: the gatherer's `on_select_experts`.

    It adds one to the layer's count of each slot for each choice that is not -1.

    Args:
        self: the gatherer, its ``_data`` int32 ``[layers, slots]``.
        layer_idx: the layer.
        topk_ids: slots ``[tokens, top_k]``, -1 where a token is padding.
    """
    if topk_ids.device.type not in DEVICES:
        return original(self, layer_idx, topk_ids)
    counts = self._data[layer_idx]
    return kernel()(topk_ids, None, counts, counts.numel())


def count_hooks() -> list[Hook]:
    """Return the hook that counts; none where Triton is missing."""
    if kernel() is None:
        return []
    return [
        Hook(
            name="eplb-count",
            target=f"{_GATHERER}.on_select_experts",
            hook=select_experts,
            counted=False,
            relies_on=("layer_idx", "topk_ids"),
            why="the recorder takes seven kernels in every layer to count, 5% of decoding",
            removable_when="the recorder counts in one kernel",
            optional=True,
        )
    ]
