"""Number the layers of a draft of speculative decoding, and name its recording.

Plans hold a draft's rows by these numbers, in both engines.
"""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")


def layer_numbers(name: str) -> list[int]:
    """Find the numbers of layers in a module's name.

    ``model.layers.61.mtp_block.mlp.experts`` has [61].
    """
    return [int(number) for number in _NUMBER.findall(name)]


def draft_layer_id(name: str) -> int | None:
    """Find the number of a draft's layer in its own name; None when there is not just one."""
    numbers = layer_numbers(name)
    return numbers[0] if len(numbers) == 1 else None


def draft_path(path: str | Path) -> Path:
    """Say where the draft's load goes: ``load.draft.safetensors`` for ``load.safetensors``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.draft{path.suffix}")
