"""Make checkpoints and files for SGLang, for tests with and without an engine."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin.core.load import ExpertLoad
from moe_placement_plugin.core.placement import Placement
from moe_placement_plugin.formats.plan_or_load import write

# Before anything imports SGLang: it looks for its device when it is imported.
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Return tiny checkpoints by name."""
    from moe_placement_plugin.lab.demo import tiny_models

    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen32": tiny_models.write_qwen3_moe(folder / "qwen32", num_experts=32),
        "qwen30": tiny_models.write_qwen3_moe(folder / "qwen30", num_experts=30),
        "glm": tiny_models.write_glm4_moe(folder / "glm"),
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Write plans and recorded loads for the tiny models (4 layers).

    They are for 2 ranks unless the name says otherwise.
    """
    import json

    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(7)
    made: dict[str, Path] = {}

    def plan(
        name: str, table, experts: int, slots: tuple[int, ...], layer_ids: tuple[int, ...] = ()
    ) -> None:
        made[name] = folder / f"{name}.json"
        write(Placement(table, experts, slots, layer_ids), made[name])

    def text(name: str, content: str, suffix: str = "json") -> None:
        made[name] = folder / f"{name}.{suffix}"
        made[name].write_text(content)

    permutation = np.stack([rng.permutation(32) for _ in range(4)])
    plan("permutation", permutation, 32, (16, 16))
    text("permutation-sglang", json.dumps({"physical_to_logical_map": permutation.tolist()}))
    plan("other-layers", permutation[:3], 32, (16, 16))
    plan("other-experts", np.stack([rng.permutation(30) for _ in range(4)]), 30, (15, 15))
    plan("four-ranks", permutation, 32, (8, 8, 8, 8))
    # As vLLM places 30 experts on 4 ranks: 8 8 7 7, without redundant experts, another permutation
    # in each layer.
    plan("uneven-four-ranks", np.stack([rng.permutation(30) for _ in range(4)]), 30, (8, 8, 7, 7))
    plan("redundant", _with_copies(permutation), 32, (18, 18))
    wrong = permutation.tolist()
    wrong[2][5] = wrong[2][4]
    text("missing-expert", json.dumps({"physical_to_logical_map": wrong}))
    text("not-json", "physical_to_logical_map: [1, 2]")
    text("neither", json.dumps({"weights": [1, 2]}))
    counts = (1e4 / (1 + rng.permutation(32)) ** 1.2 * rng.uniform(0.5, 1, (3, 4, 32))).astype(
        np.int64
    )
    text("load", json.dumps({"logical_count": counts.tolist()}))
    text("load-three", json.dumps({"logical_count": counts[:, :3].tolist()}))
    text("load-negative", json.dumps({"logical_count": (counts - 10**6).tolist()}))
    text("load-nan", json.dumps({"logical_count": (counts * np.nan).tolist()}))
    text("load-other-experts", json.dumps({"logical_count": counts[..., :30].tolist()}))
    made["load-safetensors"] = folder / "load.safetensors"
    write(ExpertLoad(counts), made["load-safetensors"])
    made["load-pt"] = folder / "load.pt"
    if importlib.util.find_spec("torch"):
        import torch

        torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, made["load-pt"])
    return made


def _with_copies(permutation: np.ndarray) -> np.ndarray:
    """Add two slots per rank: copies of the first two experts of the other rank."""
    left, right = permutation[:, :16], permutation[:, 16:]
    return np.concatenate([left, right[:, :2], right, left[:, :2]], axis=1)
