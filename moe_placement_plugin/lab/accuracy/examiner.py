"""Hold lm-eval in a child process: started once, it examines one server after the other.

    python -m moe_placement_plugin.lab.accuracy.examiner

A JSON line on stdin is a request, a JSON line on stdout its reply, ``{}`` or ``{"error": "..."}``.
The first request is the examination (`Examination`), which is checked; the others are servers
(`Candidate`). Everything else is printed to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Examination:
    """Say what lm-eval asks.

    Attributes:
        tasks: lm-eval's names of tasks, groups or tags.
        include_path: folder with task files of the user's own.
        limit: questions of each task, None for all.
        num_fewshot: worked examples in front of each question, None for the task's own number.
        batch_size: prompts of one request.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Candidate:
    """Describe a server to be examined.

    Attributes:
        url: its base URL.
        model: name under which it serves the model.
        tokenizer: folder of the checkpoint.
        max_length: tokens of a prompt with its answer that it takes.
        folder: where results go, in the form that ``lm_eval --output_path FOLDER --log_samples``
            writes.
        timeout: seconds that it may take for one request.
    """

    url: str
    model: str
    tokenizer: str
    max_length: int
    folder: str
    timeout: int


def find_tasks(examination: Examination) -> Any:
    """Return lm-eval's manager of the tasks asked for.

    Raises:
        ValueError: when a task is unknown.
    """
    from lm_eval.tasks import TaskManager

    # lm-eval's own ten thousand tasks take seconds to look through: only when one of them is meant.
    manager = None
    if examination.include_path is not None:
        manager = TaskManager(include_path=examination.include_path, include_defaults=False)
    if manager is None or any(not _known(manager, task) for task in examination.tasks):
        manager = TaskManager(include_path=examination.include_path)
    for task in examination.tasks:
        if not _known(manager, task):
            where = (
                ""
                if examination.include_path
                else "; task files of your own are found with --include-path"
            )
            raise ValueError(
                f"unknown task {task!r}: `lm_eval ls tasks` lists those that lm-eval has{where}"
            )
    return manager


def _known(manager: Any, task: str) -> bool:
    return task in manager.all_tasks or bool(manager.match_tasks([task]))


def examine(examination: Examination, manager: Any, candidate: Candidate) -> None:
    """Ask one server everything and write down what it answered."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=candidate.folder)
    results = simple_evaluate(
        model="local-completions",
        model_args={
            "model": candidate.model,
            "base_url": f"{candidate.url}/v1/completions",
            "tokenizer": candidate.tokenizer,
            "tokenizer_backend": "huggingface",
            # One request after the other, so that batches are the same for every server.
            "num_concurrent": 1,
            "max_retries": 1,
            "max_length": candidate.max_length,
            "timeout": candidate.timeout,
        },
        tasks=list(examination.tasks),
        num_fewshot=examination.num_fewshot,
        batch_size=examination.batch_size,
        limit=examination.limit,
        gen_kwargs={"temperature": 0, "do_sample": False},
        task_manager=manager,
        evaluation_tracker=tracker,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, answers in samples.items():
        tracker.save_results_samples(task_name=task, samples=answers)


def main() -> None:
    replies = _take_stdout()
    examination = manager = None
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, str] = {}
        try:
            if examination is None:
                examination = Examination(**request)
                manager = find_tasks(examination)
            else:
                candidate = Candidate(**request)
                Path(candidate.folder).mkdir(parents=True, exist_ok=True)
                examine(examination, manager, candidate)
        except Exception as error:  # whatever lm-eval raises belongs to the one who asked
            import traceback

            traceback.print_exc()
            reply = {
                "error": str(error)
                if isinstance(error, ValueError)
                else f"{type(error).__name__}: {error}"
            }
        print(json.dumps(reply), file=replies, flush=True)


def _take_stdout() -> TextIO:
    """Keep stdout for replies and send what others print to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


if __name__ == "__main__":
    main()
