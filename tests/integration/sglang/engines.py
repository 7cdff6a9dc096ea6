"""Run cases of real SGLang engines on the CPU in child processes, one start each."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.children import python, run_child
from tests.support.paths import ROOT

ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

ENGINE: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "disable_overlap_schedule": True,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "mem_fraction_static": 0.3,
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_server_warmup": True,
    "log_level": "info",
}

_random = random.Random(0)
PROMPTS = [[_random.randrange(256) for _ in range(length)] for length in (24, 40, 9, 17)]
MAX_NEW_TOKENS = 12
LONG = 48
"""Output tokens of the cases whose experts move meanwhile, and of what they are compared with."""


def threads(ranks: int) -> str:
    """Return cores of each rank for SGLANG_CPU_OMP_THREADS_BIND, this machine's in turn."""
    cores = sorted(os.sched_getaffinity(0))
    if ranks == 1:
        return ",".join(map(str, cores))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def case(
    name: str,
    model: Path,
    tp: int = 1,
    ep: int = 1,
    late_env: dict[str, str] | None = None,
    actions: tuple[str, ...] = (),
    **arguments: Any,
) -> dict:
    """Make a case for `engine_child`; with actions nothing is generated."""
    engine = (
        ENGINE
        | {"model_path": str(model), "skip_tokenizer_init": True, "tp_size": tp, "ep_size": ep}
        | arguments
    )
    return {
        "name": name,
        "engine": engine,
        "prompts": [] if actions else PROMPTS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "threads": threads(tp),
        "late_env": late_env or {},
        "actions": actions,
    }


@dataclass
class Outcome:
    """Hold what a case left behind: its result and the log of all its processes.

    The result is empty when the child died.
    """

    result: dict
    log: str

    @property
    def values(self) -> list[float]:
        """Return the log probabilities of every prompt and output token."""
        return [v for row in self.result["rows"] for v in row["prompt_logprobs"] + row["logprobs"]]

    @property
    def ids(self) -> list[list[int]]:
        """Return the greedy token ids per prompt."""
        return [row["ids"] for row in self.result["rows"]]

    def first(self, tokens: int) -> Outcome:
        """Return the same with only so many output tokens per prompt."""
        rows = [
            {**row, "ids": row["ids"][:tokens], "logprobs": row["logprobs"][:tokens]}
            for row in self.result["rows"]
        ]
        return Outcome({**self.result, "rows": rows}, self.log)

    def processes_with(self, text: str) -> set[str]:
        """Return the scheduler processes ("TP0 EP0") whose log has a line with ``text``."""
        return set(
            re.findall(r"\[[-\d]+ [:\d]+ (TP\d+ EP\d+)\] [^\n]*" + re.escape(text), self.log)
        )


def run_cases(
    cases: list[dict],
    folder: Path,
    timeout_per_case: float = 150,
    env: dict[str, str] | None = None,
    on: Callable[[list[str]], list[str]] = list,
    forked: bool = True,
) -> dict[str, Outcome]:
    """Run the cases one after another in one child process; the log is cut into cases.

    ``on`` makes the child's command run somewhere else; without ``forked`` SGLang's workers are
    spawned, as it does itself.

    The caller holds the machine's engine lock (`tests.support.children.engine_lock`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted, given = folder / "cases.json", folder / "results.json"
    wanted.write_text(json.dumps(cases))
    began = time.monotonic()
    command = python(
        "-m",
        "tests.integration.sglang.engine_child",
        str(wanted),
        str(given),
        *(["forked"] if forked else []),
    )
    finished = run_child(on(command), timeout_per_case * len(cases), ENV | (env or {}), ROOT)
    (folder / "log.txt").write_text(finished.output)
    print(f"{len(cases)} engine starts in {time.monotonic() - began:.0f} s, log in {folder}")
    results = json.loads(given.read_text()) if given.exists() else {}
    outcomes = {}
    for wanted_case in cases:
        name = wanted_case["name"]
        part = finished.output.partition(f"=== case {name}\n")[2].partition("=== case ")[0]
        outcomes[name] = Outcome(results.get(name, {}), part)
    return outcomes
