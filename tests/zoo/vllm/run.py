"""Run the zoo: ``python -m tests.zoo.vllm.run DIRECTORY NAME...`` (all without names).

vLLM is imported once; three processes are forked from here, one for vLLM alone and two for the
ranks of a placement. One that dies or hangs is noted as such for the model it had, and started
again behind it.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.zoo.vllm import process, ranks
from tests.zoo.vllm.recipe import Recipe

PATIENCE = 240.0
"""Seconds after which a model that is not done counts as hanging.

Many times what one takes on a busy machine.
"""

WAITING = 15.0
"""Seconds that one rank may take longer than the other.

It then waits for what the other has left.
"""

WAITING_IN_VAIN = 3.0
"""The same for a rank whose other ended badly: it changes nothing of the outcome then."""

FILES = {0: "alone.jsonl", 1: "rank0.jsonl", 2: "rank1.jsonl"}
"""Process -> its results."""


class Crew:
    """Run processes that go through the recipes together.

    They are ended and started again together.

    Args:
        members: numbers of their files.
        units: what they go through: recipes, or recipes with a strategy.
        directory: of the results.
        make: (units, attempt) -> processes that were not started yet.
    """

    def __init__(self, members: list[int], units: list[Any], directory: Path, make: Callable):
        self._files = [directory / FILES[member] for member in members]
        self._left, self._make, self._directory = units, make, directory
        self._attempt = 0
        self._start()

    def _start(self) -> None:
        self._attempt += 1
        self._done, self._moved = 0, time.monotonic()
        self._ahead, self._since = 0, time.monotonic()
        self._before = [self._count(file) for file in self._files]
        self._processes = self._make(self._left, self._attempt) if self._left else []
        for member in self._processes:
            member.start()

    def _count(self, file: Path) -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _ended_badly(self) -> bool:
        """Return whether the process that is ahead was refused or failed.

        What it left unsent then never comes.
        """
        ahead = max(self._files, key=self._count)
        last = ahead.read_bytes().rpartition(b"\n")[0].splitlines()[-1]
        return json.loads(last)["status"] in ("refused", "failed")

    def working(self) -> bool:
        """Look after the processes; False once all recipes are done."""
        counts = [self._count(f) - b for f, b in zip(self._files, self._before)]
        if min(counts) > self._done:
            self._done, self._moved = min(counts), time.monotonic()
        if self._done >= len(self._left):
            for member in self._processes:
                member.join(30)
                member.kill()
            return False
        if [p.exitcode for p in self._processes] == [ranks.AGAIN] * len(self._processes):
            self._left = self._left[self._done :]
            self._start()
            return True
        died = [p.exitcode for p in self._processes if p.exitcode not in (None, 0, ranks.AGAIN)]
        if max(counts) == self._ahead:
            waited = time.monotonic() - self._since if max(counts) > min(counts) else 0.0
        else:
            self._ahead, self._since, waited = max(counts), time.monotonic(), 0.0
        if WAITING_IN_VAIN < waited <= WAITING and self._ended_badly():
            waited = WAITING + 1
        if died or waited > WAITING or time.monotonic() - self._moved > PATIENCE:
            self._give_up(counts, f"exit code {died[0]}" if died else "no answer")
        return True

    def _give_up(self, counts: list[int], why: str) -> None:
        for member in self._processes:
            member.kill()
            member.join()
        unit = self._left[self._done]
        recipe, strategy = unit if isinstance(unit, tuple) else (unit, None)
        for file, count in zip(self._files, counts):
            if count == self._done:
                line = {
                    "name": recipe.name,
                    "strategy": strategy,
                    "status": "crashed",
                    "reason": why,
                }
                if max(counts) > self._done and why == "no answer":
                    line |= {"status": "waiting", "reason": "waits for the other rank"}
                with file.open("a") as end:
                    end.write(json.dumps(line) + "\n")
        path = self._directory / ranks.directory_of(recipe)
        path.mkdir(exist_ok=True)
        (path / ranks.DONE).touch()
        self._left = self._left[self._done + 1 :]
        self._start()


def run(recipes: list[Recipe], directory: Path) -> None:
    """Go through the recipes in processes of this one's, and write `FILES` into the directory."""
    import vllm.model_executor.model_loader  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.engine import arg_utils  # noqa: F401

    process.prepare_process()
    # vLLM collects garbage twice for each model; what was imported is none of it.
    gc.collect()
    gc.freeze()
    context = multiprocessing.get_context("fork")

    def one(left: list[Recipe], attempt: int) -> list[Any]:
        store = str(directory / f"alone{attempt}.store")
        return [context.Process(target=ranks.alone, args=(left, directory / FILES[0], store))]

    def two(left: list[tuple[Recipe, str]], attempt: int) -> list[Any]:
        store = str(directory / f"pair{attempt}.store")
        return [
            context.Process(target=ranks.placed, args=(left, r, directory / FILES[1 + r], store))
            for r in range(ranks.RANKS)
        ]

    units = [(recipe, strategy) for recipe in recipes for strategy in ranks.STRATEGIES]
    crews = [Crew([0], recipes, directory, one), Crew([1, 2], units, directory, two)]
    while crews:
        crews = [crew for crew in crews if crew.working()]
        time.sleep(0.2)


def main() -> None:
    process.clean_environment()
    from tests.zoo.vllm.recipes import PLANTED, RECIPES

    directory, names = Path(sys.argv[1]), sys.argv[2:]
    known = RECIPES | {PLANTED.name: PLANTED}
    run([known[name] for name in names] if names else list(known.values()), directory)


if __name__ == "__main__":
    main()
