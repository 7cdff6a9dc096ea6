"""Write a recipe's checkpoint and the plans for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_placement_plugin.formats.plan_or_load import write as write_file
from tests.zoo.checkpoint import write_config, write_tensors

from .recipe import Recipe, Tensors
from .values import EXPERTS

RANKS = 2
REDUNDANT = 2

ENV = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
"""Variables of the child processes.

Ranks look at the machine's free memory one after the other, and others use it meanwhile.
"""


CONFIG_CLASS = """from transformers import PretrainedConfig


class ZooConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **values):
        for name in list(values):
            part = name.endswith("_config") and name != "quantization_config"
            if part and isinstance(values[name], dict):
                values[name] = PretrainedConfig(**values[name])
        super().__init__(**values)
"""
"""The class of a checkpoint whose config transformers does not know: it takes everything."""


def write(recipe: Recipe, folder: Path, tensors: Tensors | None = None) -> Path:
    """Write the checkpoint.

    Args:
        recipe: the model.
        folder: where to.
        tensors: all of its tensors. None writes those of the MoE layers; what is left out
            (attention, embeddings, dense layers) the engine leaves uninitialised.
    """
    config = {"architectures": [recipe.architecture], **recipe.config}
    if recipe.remote:
        config["auto_map"] = {"AutoConfig": "configuration_zoo.ZooConfig"}
    write_config(folder, config)
    if recipe.remote:
        (folder / "configuration_zoo.py").write_text(
            CONFIG_CLASS.format(model_type=recipe.config["model_type"])
        )
    found = recipe.tensors() if tensors is None else tensors
    float8 = {
        name: "F8_E4M3"
        for name, tensor in found.items()
        if tensor.dtype == np.uint8 and not recipe.packed
    }
    write_tensors(folder / "model.safetensors", found, float8)
    return folder


def slots(recipe: Recipe, placement: str) -> dict[int, list[int]]:
    """Return the logical expert of each physical slot of each MoE layer, rank after rank.

    Args:
        recipe: the model.
        placement: ``linear``, ``zigzag``, ``shuffled`` (another order in each layer), ``replicas``
            (shuffled, each rank with a copy of an expert of the other's) or ``rebalanced`` (the
            same in another order).
    """
    found = {}
    for layer in recipe.moe:
        if placement == "linear":
            row = list(range(EXPERTS))
        elif placement == "zigzag":
            row = [e for rank in range(RANKS) for e in range(EXPERTS) if e % RANKS == rank]
        else:
            seed = 8 if placement == "rebalanced" else 7
            row = np.random.default_rng([seed, layer + recipe.offset]).permutation(EXPERTS).tolist()
            if placement in ("replicas", "rebalanced"):
                half = EXPERTS // RANKS
                row = [*row[:half], row[half], *row[half:], row[0]]
        found[layer] = row
    return found


def write_plan(recipe: Recipe, placement: str, file: Path) -> Path:
    """Write the plan file of a placement, a row for each MoE layer.

    A draft's layers have rows too, unless EPLB moves the target's experts.
    """
    from moe_placement_plugin.core.placement import Placement

    rows, draft = slots(recipe, placement), None
    size = len(next(iter(rows.values()))) // RANKS
    if recipe.draft is not None and placement == "shuffled":
        own = list(slots(recipe.draft, placement).values())
        draft = Placement(own, EXPERTS, (EXPERTS // RANKS,) * RANKS, recipe.draft.numbers)
    plan = Placement(
        list(rows.values()), EXPERTS, (size,) * RANKS, tuple(rows), "custom", {}, draft
    )
    write_file(plan, file)
    return file
