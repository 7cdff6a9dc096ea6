"""Compare whole engines of every recipe: two ranks under zigzag, one without the plugin.

Tokens and log probabilities, of all recipes that can be placed.

    python -m tests.zoo.sglang.engines FOLDER [NAME ...]

Takes minutes: two starts for each model. Writes FOLDER/engines.md. Models with images are left out:
they want a processor's files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from tests.integration.sglang.engines import Outcome, case, run_cases
from tests.support.children import engine_lock

from . import checkpoints, skeleton
from .launched import launch, results_in
from .recipe import Recipe
from .recipes import RECIPES

ZIGZAG = {"expert_placement_strategy": "zigzag"}


def chosen(names: list[str]) -> list[Recipe]:
    """Return the recipes to run."""
    able = [
        r
        for r in RECIPES
        if not r.unbuildable and "all" not in r.refused and "vision_config" not in r.config
    ]
    return [r for r in able if not names or r.name in names]


def outlines(recipes: list[Recipe], folder: Path) -> dict[str, list[skeleton.Named]]:
    """Return what each checkpoint has besides its MoE layers.

    A recipe that one rank cannot build has none.
    """
    launch(
        [
            {"name": r.name, "recipe": r.name, "placement": "outline", "arguments": {}}
            for r in recipes
        ],
        folder,
    )
    return {
        name: result["one"]["outline"]
        for name, result in results_in(folder).items()
        if result.get("one", {}).get("outline")
    }


def compared(recipe: Recipe, one: Outcome, two: Outcome) -> str:
    """Return a row of the table."""
    for what, outcome in (("one rank", one), ("two ranks", two)):
        if "rows" not in outcome.result:
            said = [line for line in outcome.log.splitlines() if "Error" in line]
            last = (said or outcome.log.splitlines() or [""])[-1]
            return f"| {recipe.name} | {what} did not answer | {last[:160]} |"
    if not np.isfinite(one.values).all():
        return f"| {recipe.name} | one rank's own answer is not finite | |"
    difference = np.abs(np.array(one.values) - np.array(two.values)).max()
    return (
        f"| {recipe.name} | {'same' if one.ids == two.ids else 'OTHER'} tokens | {difference:.1e} |"
    )


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    recipes = chosen(sys.argv[2:])
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    with engine_lock():
        outlined = outlines(recipes, folder)
        lines = ["| model | tokens | greatest difference of a log probability |", "|---|---|---|"]
        for recipe in recipes:
            if recipe.name not in outlined:
                lines.append(f"| {recipe.name} | one rank cannot build it | |")
                continue
            model = folder / recipe.name
            checkpoints.write(recipe, model, skeleton.whole(recipe, outlined[recipe.name]))
            more = recipe.engine | {"trust_remote_code": recipe.remote}
            cases = [case("one", model, **more), case("two", model, 2, 2, **more, **ZIGZAG)]
            outcomes = run_cases(cases, folder / f"{recipe.name}-runs", env=checkpoints.ENV)
            lines.append(compared(recipe, outcomes["one"], outcomes["two"]))
            print(lines[-1], flush=True)
            (folder / "engines.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
