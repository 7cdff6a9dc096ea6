"""Compare two runs of the same tasks: scores, answers, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...core.errors import PlacementError
from .results import Score, TaskAnswer, TaskResult


@dataclass(frozen=True)
class Allowance:
    """Say how far a run may be from stock.

    Attributes:
        score: greatest difference of a score; None: twice stock's standard error.
        answers: greatest number of differing answers of a task; None: any.
        logprob: difference (natural logarithm) of a choice's log probability from which on it
            counts as different. The order of additions differs between one rank and several, which
            moves float32 log probabilities by about 1e-5; a wrong expert moves them by 0.1 and
            more.
    """

    score: float | None = 0.0
    answers: int | None = 0
    logprob: float = 1e-3

    @classmethod
    def for_dtype(cls, dtype: str) -> Allowance:
        """Allow nothing in float32, and elsewhere what rounding may do.

        It may flip answers that are nearly tied, within the score's noise.
        """
        return cls() if dtype == "float32" else cls(score=None, answers=None, logprob=0.5)

    def score_difference(self, stock: Score) -> float:
        """Return the difference allowed from this score of the stock engine."""
        if self.score is not None:
            return self.score
        return 0.0 if math.isnan(stock.stderr) else 2 * stock.stderr


@dataclass(frozen=True)
class MetricComparison:
    """Compare a metric under stock and under a strategy.

    Attributes:
        stock: stock's score.
        score: the strategy's.
        allowed: difference that was allowed.
    """

    stock: Score
    score: Score
    allowed: float

    @property
    def difference(self) -> float:
        """Return the strategy's score minus stock's."""
        return self.score.value - self.stock.value

    @property
    def passed(self) -> bool:
        """Return whether the difference is allowed."""
        # Scores are quotients of counts: equal counts give equal numbers, up to the order of a sum.
        return abs(self.difference) <= self.allowed + 1e-9


@dataclass(frozen=True)
class TaskComparison:
    """Compare a task under stock and under a strategy.

    Attributes:
        questions: how many were asked.
        metrics: metric -> comparison.
        differing_answers: questions whose generated text, or whose likeliest choice, differs.
        differing_logprobs: questions with a choice whose log probability differs by more than was
            allowed.
        largest_logprob_difference: over all questions and choices, 0 for generated text.
        allowed_answers: number of differing answers that was allowed, None for any.
        examples: up to three differing answers: question, stock's, the strategy's.
    """

    questions: int
    metrics: Mapping[str, MetricComparison]
    differing_answers: int
    differing_logprobs: int
    largest_logprob_difference: float
    allowed_answers: int | None
    examples: tuple[tuple[int, str, str], ...]

    @property
    def passed(self) -> bool:
        """Return whether every score and the number of differing answers are as allowed."""
        few = (
            self.allowed_answers is None
            or max(self.differing_answers, self.differing_logprobs) <= self.allowed_answers
        )
        return few and all(metric.passed for metric in self.metrics.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {
            "passed": self.passed,
            "metrics": {
                name: {**asdict(metric), "difference": metric.difference, "passed": metric.passed}
                for name, metric in self.metrics.items()
            },
        }


def compare(
    stock: Mapping[str, TaskResult], placed: Mapping[str, TaskResult], allowance: Allowance
) -> dict[str, TaskComparison]:
    """Compare a run under a strategy with the stock engine's.

    Args:
        stock: task -> result of the stock engine.
        placed: task -> result under the strategy.
        allowance: what may differ.

    Returns:
        Task -> comparison.

    Raises:
        PlacementError: when the two did not answer the same questions.
    """
    if stock.keys() != placed.keys():
        raise PlacementError(
            f"the runs have different tasks, {sorted(stock)} and {sorted(placed)}: run the same "
            "tasks"
        )
    return {task: _compare_task(task, stock[task], placed[task], allowance) for task in stock}


def _compare_task(
    task: str, stock: TaskResult, placed: TaskResult, allowance: Allowance
) -> TaskComparison:
    if stock.answers.keys() != placed.answers.keys():
        raise PlacementError(
            f"task {task}: the runs asked different questions ({len(stock.answers)} and "
            f"{len(placed.answers)}, "
            f"{len(stock.answers.keys() & placed.answers.keys())} in common): use the same --limit "
            "and seeds"
        )
    if stock.scores.keys() != placed.scores.keys():
        raise PlacementError(
            f"task {task}: the runs have different metrics, {sorted(stock.scores)} and "
            f"{sorted(placed.scores)}"
        )
    pairs = [
        (question, answer, placed.answers[question]) for question, answer in stock.answers.items()
    ]
    gaps = [_gap(a, b) for _, a, b in pairs]
    differing = [(question[0], a.text, b.text) for question, a, b in pairs if a.text != b.text]
    return TaskComparison(
        len(pairs),
        {
            name: MetricComparison(s, placed.scores[name], allowance.score_difference(s))
            for name, s in stock.scores.items()
        },
        len(differing),
        sum(gap > allowance.logprob for gap in gaps),
        max(gaps, default=0.0),
        allowance.answers,
        tuple(differing[:3]),
    )


def _gap(a: TaskAnswer, b: TaskAnswer) -> float:
    """Return the greatest difference of a choice's log probability.

    It is infinite where only one of the two is a number.
    """
    if len(a.logprobs) != len(b.logprobs):
        return math.inf
    gaps = [abs(x - y) if x != y else 0.0 for x, y in zip(a.logprobs, b.logprobs)]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)
