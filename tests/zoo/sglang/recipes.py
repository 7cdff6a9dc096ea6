"""List all recipes of checkpoints that can be placed."""

from __future__ import annotations

from .mla import MLA_MODELS
from .others import OTHERS
from .qwen import QWEN
from .recipe import Recipe
from .step import STEP_MODELS

RECIPES: tuple[Recipe, ...] = (*MLA_MODELS, *QWEN, *OTHERS, *STEP_MODELS)
