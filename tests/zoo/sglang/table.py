"""Write SGLang's section of ``docs/zoo.md``: ``python -m tests.zoo.sglang.table``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.support.paths import DOCS

from .drafts import DRAFTED
from .quantized import QUANTIZED
from .recipe import Recipe
from .recipes import RECIPES
from .refused import DENSE, DRAFTS, NOT_ON_A_CPU, REFUSED, TRANSFORMERS

PAGE = DOCS / "zoo.md"
BEGIN, END = "<!-- SGLang: begin -->", "<!-- SGLang: end -->"


def _row(recipe: Recipe) -> str:
    name = f"`{recipe.architecture}`" + (
        f" ({recipe.variant.replace('-', ' ')})" if recipe.variant else ""
    )
    if recipe.unbuildable:
        return f"| {name} | not on a CPU | {recipe.unbuildable} |"
    if "all" in recipe.refused:
        return f"| {name} | refused | {recipe.refused['all']} |"
    if recipe.refused:
        return f"| {name} | placed | without redundant experts: {recipe.refused['replicas']} |"
    how = "slot by slot, before SGLang packs the tensors for its kernels" if recipe.raw else ""
    return f"| {name} | placed | {how} |"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def section() -> str:
    """Return the table, Markdown."""
    lines = [
        BEGIN,
        "## SGLang 0.5.20",
        "",
        "Two ranks of SGLang's CPU engine load each tiny checkpoint through SGLang's own loader, "
        "under zigzag, under a",
        "shuffled plan and under EPLB with redundant experts. *Placed* means that each slot then "
        "holds the checkpoint's expert",
        "and that the layer answers as one rank does. `python -m tests.zoo.sglang.table` writes "
        "this section.",
        "",
        "| model class | | why |",
        "|---|---|---|",
    ]
    recipes = (*RECIPES, *QUANTIZED, *DRAFTED, *REFUSED)
    loaded = {recipe.draft.architecture for recipe in DRAFTED if recipe.draft is not None}
    lines += sorted(map(_row, recipes), key=str.lower)
    lines += [
        f"| `{name}` | not on a CPU | importing its module fails: {why} |"
        for name, why in sorted(NOT_ON_A_CPU.items())
    ]
    lines += [
        "",
        "Draft models are placed with the model that they draft for "
        "([sglang.md](sglang.md#drafts-speculative-decoding)). Loaded",
        f"likewise, after their targets: {_names(loaded)}. The others' layers are of the",
        "same classes as their targets' above, or their targets are refused: "
        f"{_names(DRAFTS - loaded)}.",
        "",
        "The back end for transformers' own code is refused by name: "
        f"{', '.join(f'`{name}`' for name in sorted(TRANSFORMERS))}.",
        "",
        f"Without experts: {', '.join(f'`{name}`' for name in sorted(DENSE))}.",
        END,
    ]
    return "\n".join(lines)


def current() -> str:
    """Return the section as the page has it; empty where it has none."""
    text = PAGE.read_text() if PAGE.exists() else ""
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.DOTALL)
    return found[0] if found else ""


def write() -> None:
    """Put the section into the page, in the place of the old one or at the end."""
    text = PAGE.read_text() if PAGE.exists() else "# The zoo: which MoE models are placed\n"
    old = current()
    PAGE.write_text(text.replace(old, section()) if old else f"{text.rstrip()}\n\n{section()}\n")


if __name__ == "__main__":
    write()
