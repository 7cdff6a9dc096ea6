"""Put together what became of each recipe, from the processes of the zoo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.zoo.vllm.listed import FAULTS
from tests.zoo.vllm.ranks import STRATEGIES
from tests.zoo.vllm.recipe import Recipe
from tests.zoo.vllm.run import FILES

_WORST = ("crashed", "wrong", "failed", "refused", "waiting", "placed")


@dataclass(frozen=True)
class Outcome:
    """Hold what became of a recipe.

    Attributes:
        built: whether vLLM alone could build and load it on one rank.
        reason: why not.
        status: strategy -> ``placed``, ``refused``, ``none`` (not tried), ``wrong``, ``failed`` or
            ``crashed``.
        reasons: strategy -> what was said.
        silent: why the layers' answers were not compared; empty when they were.
    """

    built: bool
    reason: str
    status: dict[str, str]
    reasons: dict[str, str]
    silent: str = ""


def read(directory: Path) -> dict[str, Outcome]:
    """Read each recipe's outcome from the files that `run` has written."""
    alone, *ranks = (_lines(directory / file) for file in FILES.values())
    by_unit = [{(line["name"], line["strategy"]): line for line in rank} for rank in ranks]
    return {line["name"]: _outcome(line, by_unit) for line in alone}


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _outcome(alone: dict, ranks: list[dict[tuple[str, str], dict]]) -> Outcome:
    built = alone["status"] == "built"
    status, reasons = {}, {}
    for strategy in STRATEGIES if built else ():
        lost = {"status": "crashed", "reason": "no result"}
        seen = [rank.get((alone["name"], strategy), lost) for rank in ranks]
        if {one["status"] for one in seen} == {"none"}:
            status[strategy], reasons[strategy] = "none", ""
            continue
        worst = min(seen, key=lambda one: _WORST.index(one["status"]))
        status[strategy], reasons[strategy] = worst["status"], worst["reason"]
    return Outcome(built, alone["reason"], status, reasons, alone.get("silent", ""))


def rows(recipes: dict[str, Recipe], outcomes: dict[str, Outcome]) -> list[list[str]]:
    """Return lines of the documentation's table.

    They have the recipe, its checkpoint, the status under each strategy, and reasons.
    """
    lines = []
    for name, recipe in recipes.items():
        outcome = outcomes[name]
        if not outcome.built:
            why = f"{recipe.unbuildable}: {recipe.cause}" if recipe.cause else recipe.unbuildable
            lines.append([name, recipe.stored, *["not built"] * len(STRATEGIES), why])
            continue
        said = {
            FAULTS.get((name, strategy)) or short(reason): None
            for strategy, reason in outcome.reasons.items()
            if reason
        }
        if recipe.loaded_only:
            said[f"slots as the loader left them: {recipe.loaded_only}"] = None
        elif outcome.silent:
            said[f"slots only: vLLM's CPU routing has no answer ({outcome.silent})"] = None
        if recipe.lacks:
            said[f"built with a stand-in for what vLLM's CPU build lacks: {recipe.lacks}"] = None
        if recipe.ranks_differ:
            said[f"compared with two ranks without a placement: {recipe.ranks_differ}"] = None
        cells = [outcome.status[s].replace("none", "-") for s in STRATEGIES]
        lines.append([name, recipe.stored, *cells, "; ".join(said)])
    return lines


def short(reason: str, limit: int = 160) -> str:
    """Return a reason without the model's path and layer, cut where it becomes advice."""
    reason = reason.split("/")[-1] if reason.startswith("/") else reason
    text = " ".join(word for word in reason.split() if "/" not in word or len(word) < 12)
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " ..."
