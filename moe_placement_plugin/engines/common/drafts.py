"""What both engines call a draft of speculative decoding: its layers, by whose numbers plans hold rows, and its recording."""

from __future__ import annotations

import re
from pathlib import Path

_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")


def layer_numbers(name: str) -> list[int]:
    """The numbers of layers in a module's name: [61] of ``model.layers.61.mtp_block.mlp.experts``."""
    return [int(number) for number in _NUMBER.findall(name)]


def draft_layer_id(name: str) -> int | None:
    """A layer's number in the draft's own names: 61 of ``model.layers.61.mtp_block.mlp.experts``; None without just one."""
    found = layer_numbers(name)
    return found[0] if len(found) == 1 else None


def draft_path(path: str | Path) -> Path:
    """Where the draft's load goes: ``load.draft.safetensors`` for ``load.safetensors``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.draft{path.suffix}")
