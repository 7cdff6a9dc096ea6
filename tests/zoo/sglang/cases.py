"""List what the zoo asks for: every recipe under every placement, and every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .checkpoints import REDUNDANT
from .drafts import DRAFTED
from .quantized import QUANTIZED
from .recipe import Recipe
from .recipes import RECIPES
from .refused import REFUSED

PLACEMENTS: dict[str, dict[str, Any]] = {
    "zigzag": {"expert_placement_strategy": "zigzag"},
    "shuffled": {},
    "replicas": {"enable_eplb": True, "ep_num_redundant_experts": REDUNDANT},
}
"""Placement -> arguments of ``ServerArgs``.

Those but zigzag come with a plan file, see `checkpoints.slots`.
"""

WITHOUT_BIASES = replace(
    next(recipe for recipe in RECIPES if recipe.name == "GptOssForCausalLM"),
    variant="without-biases",
    without=("_proj_bias",),
)
"""An incomplete checkpoint: the biases of its experts are missing.

Under their shards the matrices come too.
"""

BY_NAME: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (*RECIPES, *QUANTIZED, *DRAFTED, *REFUSED, WITHOUT_BIASES)
}


def name_of(recipe: Recipe, placement: str) -> str:
    """Return a case's name."""
    return f"{recipe.name} {placement}"


def expected_refusal(recipe: Recipe, placement: str) -> str:
    """Return what the refusal must say; empty where the model must be placed."""
    return recipe.refused.get("all", recipe.refused.get(placement, ""))


def all_cases() -> list[dict[str, Any]]:
    """Return cases for `launcher`, one recipe's together."""
    cases = [
        {
            "name": name_of(recipe, placement),
            "recipe": recipe.name,
            "placement": placement,
            "arguments": arguments,
        }
        for recipe in (*RECIPES, *QUANTIZED, *DRAFTED, *REFUSED)
        for placement, arguments in PLACEMENTS.items()
        if recipe.moe or placement == "zigzag"
    ]
    return [*cases, MISTAKEN, INCOMPLETE]


MISTAKEN = {
    "name": "mistaken",
    "recipe": "Qwen3MoeForCausalLM",
    "placement": "zigzag",
    "arguments": PLACEMENTS["zigzag"],
    "examined": "shuffled",
}
"""Cases that are loaded by one map and examined by another.

What an engine would look like whose loader heeds no map.
"""

INCOMPLETE = {
    "name": "incomplete",
    "recipe": WITHOUT_BIASES.name,
    "placement": "zigzag",
    "arguments": PLACEMENTS["zigzag"],
}
