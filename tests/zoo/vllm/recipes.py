"""List the zoo: a recipe for each class of vLLM's registry that has experts."""

from __future__ import annotations

from dataclasses import replace

from tests.zoo.vllm import (
    recipes_draft,
    recipes_more,
    recipes_quantized,
    recipes_text,
    recipes_vision,
    recipes_wrapped,
)

_FAMILIES = (
    recipes_text,
    recipes_more,
    recipes_vision,
    recipes_wrapped,
    recipes_draft,
    recipes_quantized,
)

PLANTED = replace(recipes_text.RECIPES[0], name="planted", planted=True)
"""A loader that exchanges two experts, so that it is known that the zoo would see it.

It is not in the table.
"""

RECIPES = {recipe.name: recipe for family in _FAMILIES for recipe in family.RECIPES}
"""Name -> recipe."""
