"""Have each case loaded by two ranks and by one without the plugin; write what they say.

They run in a child process, two of the ranks under its placement.

    python -m tests.zoo.sglang.launcher CASES.json RESULTS.pickle

A case is {"name", "recipe", "placement", "arguments": {of ServerArgs}, "examined": another
placement that its slots are compared with}. The launcher does what `sglang.launch_server` does
until its workers start: plugins, ``ServerArgs``, `check_server_args`. A worker that dies or does
not answer is an error of its case; the next case gets new workers.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pickle
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.integration.sglang.engines import ENGINE
from tests.support.warm_workers import WarmContext

from . import checkpoints
from .cases import BY_NAME
from .recipe import Recipe
from .worker import IMPORTED
from .worker import main as work

SECONDS = 120
"""Time that a worker has for one model."""

ARGUMENTS = {k: v for k, v in ENGINE.items() if k != "log_level"} | {
    "log_level": "warning",
    "skip_tokenizer_init": True,
}


@functools.lru_cache(maxsize=1)
def _warm() -> WarmContext:
    """Fork workers from a process that has imported what a scheduler has.

    It does so when it loads plugins.
    """
    return WarmContext(IMPORTED)


class Ranks:
    """Hold persistent worker processes."""

    def __init__(self, count: int, plugin: bool):
        self.count, self.plugin, self.workers = count, plugin, []

    def start(self) -> None:
        context = _warm()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ["SGLANG_PLUGINS"] = "" if self.plugin else "none"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(rank, self.count, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        os.environ.pop("SGLANG_PLUGINS")

    def ask(self, *job: Any) -> None:
        """Give each rank the job; `answers` waits for what they say."""
        if not self.workers:
            self.start()
        for _, pipe in self.workers:
            pipe.send(job)

    def answers(self) -> list[dict[str, Any]]:
        """Return each rank's answer."""
        answers, end = [], time.monotonic() + SECONDS
        for rank, (process, pipe) in enumerate(self.workers):
            try:
                ready = pipe.poll(max(1, end - time.monotonic()))
                answers.append(
                    pipe.recv()
                    if ready
                    else {"error": f"rank {rank} did not answer within {SECONDS} s", "lost": True}
                )
            except EOFError:
                process.join(5)
                answers.append(
                    {"error": f"rank {rank} died with code {process.exitcode}", "lost": True}
                )
        if (
            any(answer.get("lost") for answer in answers)
            or len({bool(a.get("refused") or a.get("error")) for a in answers}) > 1
        ):
            self.stop()
        return answers

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def arguments_of(values: dict[str, Any]) -> bytes:
    """Return ``ServerArgs`` as they go to the workers."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.runtime_context import reset_context

    from moe_placement_plugin.engines.sglang.state import STATE

    reset_context()
    STATE.settings = None
    server_args = Engine.server_args_class(**values)
    server_args.resolve_once()
    server_args.check_server_args()
    return pickle.dumps(server_args)


def run(
    case: dict[str, Any], two: Ranks, one: Ranks, folder: Path, known: dict[str, Any]
) -> dict[str, Any]:
    """Return one case's result: {"refused"} or {"ranks", "one"} or {"error"}."""
    recipe = BY_NAME[case["recipe"]]
    model = folder / recipe.name
    if not model.exists():
        checkpoints.write(recipe, model)
    values = (
        ARGUMENTS | recipe.engine | {"model_path": str(model), "trust_remote_code": recipe.remote}
    )
    if recipe.draft is not None:
        values["speculative_draft_model_path"] = str(_draft(recipe, folder))
    placed = dict(case["arguments"])
    if case["placement"] in ("shuffled", "replicas"):
        file = folder / f"{recipe.name}-{case['placement']}.json"
        placed["expert_placement_file"] = str(
            checkpoints.write_plan(recipe, case["placement"], file)
        )
    if case["placement"] == "outline":
        one.ask(arguments_of(values | {"tp_size": 1, "ep_size": 1}), recipe.name, "outline")
        return {"one": one.answers()[0]}
    try:
        arguments = arguments_of(values | {"tp_size": 2, "ep_size": 2} | placed)
    except ValueError as error:
        if type(error).__name__ != "PlacementError":
            raise
        return {"refused": str(error)}
    alone = None
    if recipe.name not in known:
        alone = arguments_of(values | {"tp_size": 1, "ep_size": 1})
    two.ask(arguments, recipe.name, case.get("examined", case["placement"]))
    if alone is not None:  # meanwhile: ranks mostly wait for each other
        one.ask(alone, recipe.name, "linear")
    ranks = two.answers()
    if alone is not None:
        known[recipe.name] = one.answers()[0]
    if all(rank.get("refused") for rank in ranks):
        return {"refused": ranks[0]["refused"], "late": True}
    return {"ranks": ranks, "one": known[recipe.name]}


def _draft(recipe: Recipe, folder: Path) -> Path:
    """Return the checkpoint of a recipe's draft: the target's own, or another."""
    assert recipe.draft is not None
    if not recipe.draft.config:
        return folder / recipe.name
    own = folder / f"{recipe.name}-draft"
    return own if own.exists() else checkpoints.write(recipe.draft, own)


def main() -> None:
    _warm()  # imports SGLang meanwhile
    importlib.import_module("tests.zoo.sglang.standins")  # before SGLang
    from sglang.srt.plugins import load_plugins

    load_plugins()
    cases = json.loads(Path(sys.argv[1]).read_text())
    two, one, results, known = Ranks(2, True), Ranks(1, False), {}, {}
    for case in cases:
        began = time.monotonic()
        try:
            result = run(case, two, one, Path(sys.argv[2]).parent, known)
        except Exception:
            result = {"error": traceback.format_exc()}
        results[case["name"]] = result | {"seconds": time.monotonic() - began}
        print(
            f"=== {case['name']} {time.monotonic() - began:.1f} s {result.get('refused', '')[:90]}",
            flush=True,
        )
        Path(sys.argv[2]).write_bytes(pickle.dumps(results))
    two.stop()
    one.stop()


if __name__ == "__main__":
    main()
