"""Turn what the command line asks of ``verify accuracy`` into a check that can be run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import PlacementError
from ...engines.common.installed import require_engine
from ..servers.engines import SERVING_ENGINES, ServerSettings
from .compare import Allowance
from .examiner import Examination
from .run import AccuracyCheck, Configuration, configurations


@dataclass(frozen=True)
class AccuracyOptions:
    """Hold what the command line asks of ``verify accuracy``.

    Attributes:
        model: folder of the checkpoint.
        tasks: lm-eval tasks, groups or tags, separated by commas.
        include_path: folder with task files of the user's own, or None.
        engine: name of the engine, None for the one that is installed.
        strategies: names, separated by commas; ``name+N`` has N redundant experts.
        redundant: redundant experts per layer of strategies without ``+N``.
        file: plan or recorded load, or None.
        ranks: tensor-parallel and EP ranks of the placed servers.
        stock_ranks: tensor-parallel ranks of the stock server.
        limit: questions of each task, None for all.
        num_fewshot: worked examples per question, None for the task's.
        batch_size: questions of one request.
        device: ``cpu``, ``gpu`` or ``auto``.
        dtype: of the servers, None for the usual one.
        max_model_len: tokens of a prompt with its answer.
        server_arguments: more words for the engine's command line.
        online: whether lm-eval may fetch data sets from the hub.
        score: allowed difference of each score, None for the usual one.
        answers: allowed number of differing answers of each task, likewise.
        logprob: allowed difference of a choice's log probability, likewise.
        timeout: seconds for a server to start, and for lm-eval to finish.
    """

    model: Path
    tasks: str
    include_path: Path | None
    engine: str | None
    strategies: str
    redundant: int
    file: Path | None
    ranks: int
    stock_ranks: int
    limit: int | None
    num_fewshot: int | None
    batch_size: int
    device: str
    dtype: str | None
    max_model_len: int
    server_arguments: tuple[str, ...]
    online: bool
    score: float | None
    answers: int | None
    logprob: float | None
    timeout: float


def find_engine(options: AccuracyOptions) -> str:
    """Return the engine's name.

    Raises:
        PlacementError: when it is unknown or not installed.
    """
    if options.engine is not None and options.engine not in SERVING_ENGINES:
        raise PlacementError(
            f"--engine {options.engine}: choose one of {', '.join(SERVING_ENGINES)}"
        )
    return require_engine(options.engine)


def check_model(model: Path) -> None:
    """Refuse a folder that holds no checkpoint.

    Raises:
        PlacementError: naming the folder.
    """
    if not (model / "config.json").is_file():
        raise PlacementError(f"--model {model} has no config.json: give the folder of a checkpoint")


def make_check(options: AccuracyOptions, engine: str) -> AccuracyCheck:
    """Make the check that is asked for.

    Args:
        options: what is asked.
        engine: name of the engine.

    Raises:
        PlacementError: when something of it does not go together.
    """
    if options.file is not None and not options.file.exists():
        raise PlacementError(f"{options.file} does not exist: give a plan or a recorded load")
    on_cpu = is_on_cpu(options.device)
    dtype = options.dtype or ("float32" if on_cpu else "auto")
    wanted = _wanted(options)
    settings = ServerSettings(
        on_cpu, dtype, options.max_model_len, options.stock_ranks, options.server_arguments
    )
    return AccuracyCheck(
        engine=SERVING_ENGINES[engine],
        model=options.model,
        wanted=wanted,
        examination=_examination(options),
        settings=settings,
        allowance=_allowance(options, dtype),
        offline=not options.online,
        timeout=options.timeout,
    )


def is_on_cpu(device: str) -> bool:
    """Decide whether servers run on the CPU: for ``auto``, where torch finds no GPU.

    Raises:
        PlacementError: when the device is unknown.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise PlacementError(f"--device {device}: choose cpu, gpu or auto")
    if device != "auto":
        return device == "cpu"
    import torch  # both engines bring it

    return not torch.cuda.is_available()


def _wanted(options: AccuracyOptions) -> list[Configuration]:
    """Return stock and a configuration for each strategy.

    Raises:
        PlacementError: when no strategy is named.
    """
    names = [s.strip() for s in options.strategies.split(",") if s.strip()]
    wanted = configurations(names, options.ranks, options.redundant, options.file)
    if len(wanted) == 1:
        raise PlacementError("--strategies is empty: name at least one, such as zigzag")
    return wanted


def _examination(options: AccuracyOptions) -> Examination:
    """Return what lm-eval asks.

    Raises:
        PlacementError: when no task is named.
    """
    names = tuple(t.strip() for t in options.tasks.split(",") if t.strip())
    if not names:
        raise PlacementError("--tasks is empty: name at least one task of lm-eval")
    folder = None if options.include_path is None else str(options.include_path)
    return Examination(names, folder, options.limit, options.num_fewshot, options.batch_size)


def _allowance(options: AccuracyOptions, dtype: str) -> Allowance:
    """Return what may differ: the usual of the type, but for what is asked."""
    usual = Allowance.for_dtype(dtype)
    if options.score is not None:
        usual = dataclasses.replace(usual, score=options.score)
    if options.answers is not None:
        usual = dataclasses.replace(usual, answers=options.answers)
    if options.logprob is not None:
        usual = dataclasses.replace(usual, logprob=options.logprob)
    return usual
