"""Write checkpoints in other layouts than those that the tiny models are written in."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def fuse_experts(source: Path, target: Path) -> Path:
    """Copy a checkpoint with all experts of a layer in one tensor.

    They are ``gate_up_proj [experts, 2 * width, hidden]`` and ``down_proj [experts, hidden,
    width]``.

    The layout in which transformers 5 writes Qwen3-MoE.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors, experts = {}, defaultdict(dict)
    for name, tensor in load_file(file).items():
        match = _EXPERT.fullmatch(name)
        if match:
            experts[match[1]][int(match[2]), match[3]] = tensor
        else:
            tensors[name] = tensor
    assert experts, f"{source} has no experts"
    for prefix, parts in experts.items():
        count = 1 + max(expert for expert, _ in parts)
        tensors[f"{prefix}.gate_up_proj"] = np.stack(
            [np.concatenate([parts[e, "gate"], parts[e, "up"]]) for e in range(count)]
        )
        tensors[f"{prefix}.down_proj"] = np.stack([parts[e, "down"] for e in range(count)])
    save_file(tensors, file, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.exists():
        index.write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)})
        )
    return target
