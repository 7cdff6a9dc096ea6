"""Read what lm-eval wrote about one run: scores with standard errors, and every answer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import PlacementError
from ...formats.atomic import read_json


@dataclass(frozen=True)
class Score:
    """Hold a metric of a task: its value and its standard error.

    Attributes:
        value: what lm-eval reports, between 0 and 1 for accuracies.
        stderr: lm-eval's standard error of it, NaN where it has none.
    """

    value: float
    stderr: float


@dataclass(frozen=True)
class TaskAnswer:
    """Hold what the model answered to one question.

    Attributes:
        text: the generated text, or for a choice the number of the likeliest one.
        logprobs: log probabilities (natural logarithm) of the choices, ``[choices]``; empty for a
            generated text.
    """

    text: str
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """Hold one task of one run.

    Attributes:
        scores: metric (``exact_match,none``) -> score.
        answers: question -> answer. A question is lm-eval's number of the document and its hash of
            the prompt, so that answers to different prompts are never compared.
    """

    scores: Mapping[str, Score]
    answers: Mapping[tuple[int, str], TaskAnswer]


def read_results(folder: Path) -> dict[str, TaskResult]:
    """Read what ``lm_eval --output_path FOLDER --log_samples`` wrote.

    Args:
        folder: the output path of one run.

    Returns:
        Task -> result, without groups, whose scores are means of their tasks'.

    Raises:
        PlacementError: when the folder does not hold exactly one run with its samples.
    """
    files = sorted(folder.rglob("results_*.json"))
    if len(files) != 1:
        raise PlacementError(
            f"{folder} holds {len(files)} results of lm-eval, one is expected: give each run an "
            "empty folder"
        )
    data = read_json(files[0], "result of lm-eval")
    stamp = files[0].stem.removeprefix("results_")
    found = {}
    for task in data["configs"]:
        samples = files[0].with_name(f"samples_{task}_{stamp}.jsonl")
        if not samples.exists():
            raise PlacementError(
                f"{files[0]} has no samples of task {task}: run lm-eval with --log_samples"
            )
        answers: dict[tuple[int, str], TaskAnswer] = {}
        with open(samples, encoding="utf-8") as lines:
            for line in lines:
                sample = json.loads(line)
                # A line for each filter of the task; what the model said is the same in all of
                # them.
                answers.setdefault(
                    (sample["doc_id"], sample["prompt_hash"]),
                    _answer(sample, data["configs"][task]["output_type"]),
                )
        found[task] = TaskResult(_scores(data["results"][task]), answers)
    return found


def _scores(row: Mapping[str, Any]) -> dict[str, Score]:
    scores = {}
    for name, value in row.items():
        metric, _, filter_name = name.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = row.get(f"{metric}_stderr,{filter_name}")
        scores[name] = Score(
            float(value), float(error) if isinstance(error, (int, float)) else math.nan
        )
    return scores


def _answer(sample: Mapping[str, Any], output_type: str) -> TaskAnswer:
    if output_type == "generate_until":
        return TaskAnswer(str(sample["resps"][0][0]))
    # For each choice its log probability and whether greedy decoding gives it; or for a rolling one
    # the number alone.
    values = [response[0] for response in sample["resps"]]
    logprobs = tuple(float(value[0] if isinstance(value, list) else value) for value in values)
    if output_type == "multiple_choice":
        return TaskAnswer(str(max(range(len(logprobs)), key=logprobs.__getitem__)), logprobs)
    return TaskAnswer(str([value[1] for value in values if isinstance(value, list)]), logprobs)
