"""Make checkpoints and files for vLLM, for tests with and without an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_placement_plugin import ExpertLoad, Placement
from moe_placement_plugin.formats.plan_or_load import write
from moe_placement_plugin.lab.demo.tiny_models import write_glm4_moe, write_qwen3_moe
from tests.support.checkpoints import fuse_experts


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Name -> checkpoint: Qwen3-MoE with 30 experts, GLM-4-MoE with 32 in 4 groups."""
    folder = tmp_path_factory.mktemp("checkpoints")
    qwen = write_qwen3_moe(folder / "qwen")
    return {
        "qwen": qwen,
        "glm": write_glm4_moe(folder / "glm"),
        "fused": fuse_experts(qwen, folder / "fused"),
    }


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Write a skewed load for each model, and an uneven plan that differs in every layer."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(1)
    paths = {}
    for name, layers, experts in (("qwen", range(4), 30), ("glm", range(1, 4), 32)):
        paths[name] = folder / f"{name}.safetensors"
        write(ExpertLoad(rng.zipf(1.5, (2, len(layers), experts)), tuple(layers)), paths[name])
    paths["uneven"] = folder / "uneven.json"
    write(Placement([rng.permutation(30) for _ in range(4)], 30, (17, 13)), paths["uneven"])
    return paths
