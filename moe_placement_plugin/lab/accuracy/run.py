"""Serve stock on one rank, then every strategy on several, and examine each with lm-eval."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...core.errors import PlacementError
from ...strategies import get_strategy
from ..servers.engines import Placed, ServerSettings, ServingEngine, report_of_workers
from ..servers.server import Server, free_port
from .compare import Allowance, TaskComparison, compare
from .examiner import Candidate, Examination
from .harness import Examiner
from .results import TaskResult, read_results

STOCK = "stock"

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Configuration:
    """Describe one way to serve the model.

    Attributes:
        name: ``stock``, or the strategy as the user wrote it.
        placed: the placement, None for stock.
    """

    name: str
    placed: Placed | None = None


@dataclass(frozen=True)
class Run:
    """Hold what one configuration answered.

    Attributes:
        tasks: task -> result.
        start_seconds: until the server answered.
        examine_seconds: that lm-eval took.
        placement: line in which the engine's workers report the placement in force, empty for
            stock.
    """

    tasks: Mapping[str, TaskResult]
    start_seconds: float
    examine_seconds: float
    placement: str


@dataclass(frozen=True)
class Verdict:
    """Hold all runs of a model, and compare them.

    Attributes:
        runs: configuration -> run, stock first.
        comparisons: strategy -> task -> comparison with stock.
    """

    runs: Mapping[str, Run]
    comparisons: Mapping[str, Mapping[str, TaskComparison]]

    @property
    def passed(self) -> bool:
        """Return whether every strategy answers as stock does, within what was allowed."""
        return all(task.passed for tasks in self.comparisons.values() for task in tasks.values())


def configurations(
    strategies: Sequence[str], ranks: int, redundant: int, file: Path | None
) -> list[Configuration]:
    """Return stock and one configuration for each strategy.

    Args:
        strategies: names, each with ``+N`` behind it for N redundant experts in place of
            ``redundant``.
        ranks: tensor-parallel and EP ranks of the strategies.
        redundant: redundant experts per layer.
        file: plan or recorded load for the strategies that plan from one.

    Raises:
        PlacementError: when a strategy is unknown, named twice, or needs a load and has none.
    """
    found = [Configuration(STOCK)]
    for written in strategies:
        name, plus, number = written.partition("+")
        if plus and not number.isdigit():
            raise PlacementError(
                f"--strategies {written}: a number of redundant experts follows the +, such as "
                f"{name}+4"
            )
        needs_load = get_strategy(name).needs_load
        if needs_load and file is None:
            raise PlacementError(
                f"strategy {name} places experts by a recorded load and has none: add "
                "--expert-placement-file with a recorded load or a plan"
            )
        if any(written == other.name for other in found):
            raise PlacementError(f"--strategies names {written} twice: name each once")
        placed = Placed(
            name, ranks, file if needs_load else None, int(number) if plus else redundant
        )
        found.append(Configuration(written, placed))
    return found


@dataclass(frozen=True)
class AccuracyCheck:
    """Hold what is served and examined, and how far it may be from stock.

    Attributes:
        engine: the engine.
        model: the checkpoint.
        wanted: configurations, stock first.
        examination: what is asked.
        settings: what the servers share.
        allowance: what may differ from stock.
        offline: whether lm-eval must not ask the hub.
        timeout: seconds that a server may take to start, and lm-eval to finish.
    """

    engine: ServingEngine
    model: Path
    wanted: Sequence[Configuration]
    examination: Examination
    settings: ServerSettings
    allowance: Allowance
    offline: bool
    timeout: float


def run(check: AccuracyCheck, folder: Path, progress: Progress) -> Verdict:
    """Serve and examine every configuration, and compare with the first, which is stock.

    Args:
        check: what is served and examined.
        folder: where logs and lm-eval's results go, a folder for each configuration.
        progress: called with (what is being done, seconds, last line of output).

    Raises:
        PlacementError: when a server or lm-eval fails.
    """
    for configuration in check.wanted:
        # What it cannot be asked for is known before the first server starts.
        check.engine.command(check.model, 0, configuration.placed, check.settings)
    runs: dict[str, Run] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with Examiner(
        check.examination,
        check.offline,
        folder / "lm_eval.log",
        lambda s, text: progress("loading lm-eval", s, text),
    ) as examiner:
        for configuration in check.wanted:
            runs[configuration.name] = _run(check, configuration, examiner, folder, progress)
    stock, *others = (configuration.name for configuration in check.wanted)
    return Verdict(
        runs,
        {name: compare(runs[stock].tasks, runs[name].tasks, check.allowance) for name in others},
    )


def _run(
    check: AccuracyCheck,
    configuration: Configuration,
    examiner: Examiner,
    folder: Path,
    progress: Progress,
) -> Run:
    """Serve and examine one configuration.

    Raises:
        PlacementError: when its server or lm-eval fails, or no placement is in force.
    """
    port = free_port()
    line, env = check.engine.command(check.model, port, configuration.placed, check.settings)
    what = f"{check.engine.name} {configuration.name}"
    log = folder / f"{configuration.name}.log"
    # Its results are read as the only ones in their folder, which may be left from an earlier run.
    results = Path(tempfile.mkdtemp(prefix=f"{configuration.name}-", dir=folder))
    began = time.monotonic()
    starting = partial(progress, f"starting {what}")
    try:
        with Server(line, port, env, log, check.timeout, starting) as server:
            ready = time.monotonic()
            candidate = Candidate(
                server.url,
                "tiny",
                str(check.model),
                check.settings.max_model_len,
                str(results),
                round(check.timeout),
            )
            examiner.examine(candidate, check.timeout, partial(progress, f"asking {what}"))
            ended = time.monotonic()
            progress(f"stopping {what}", ended - began, "")
    except PlacementError as error:
        raise PlacementError(f"{what}: {error}") from None
    placement = report_of_workers(log)
    if configuration.placed is not None and not placement:
        raise PlacementError(
            f"{what}: no worker has reported a placement in force: "
            f"see {log} and `moe-placement doctor`"
        )
    return Run(read_results(results), ready - began, ended - ready, placement)
