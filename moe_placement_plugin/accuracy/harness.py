"""lm-eval in a child process, against a running server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import PlacementError

MEND = "install the extra `accuracy` (pip install 'moe-placement-plugin[accuracy]')"

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""What keeps lm-eval, datasets and transformers from asking the hub."""


@dataclass(frozen=True)
class Examination:
    """What lm-eval asks.

    Attributes:
        tasks: lm-eval's names of tasks, groups or tags.
        include_path: folder with task files of the user's own.
        limit: questions of each task, None for all.
        num_fewshot: worked examples in front of each question, None for the task's own number.
        batch_size: prompts of one request.
        offline: whether data sets must be on this machine already.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    offline: bool = True


def check(examination: Examination) -> None:
    """Refuse before a server is started what lm-eval would refuse after it.

    Raises:
        PlacementError: when lm-eval, the folder or a task is missing.
    """
    for module in ("lm_eval", "tenacity", "aiohttp"):
        if find_spec(module) is None:
            raise PlacementError(f"{module} is not installed in this environment, and answers are examined with lm-eval: {MEND}")
    folder = examination.include_path
    if folder is not None and not folder.is_dir():
        raise PlacementError(f"--include-path {folder} is no folder: give the folder with the task files")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in examination.tasks:
        if task not in manager.all_tasks and not manager.match_tasks([task]):
            where = "" if folder is not None else "; task files of your own are found with --include-path"
            raise PlacementError(f"unknown task {task!r}: `lm_eval ls tasks` lists those that lm-eval has{where}")


def command(examination: Examination, url: str, name: str, tokenizer: Path, max_length: int, folder: Path) -> list[str]:
    """The command line of lm-eval for one server.

    Args:
        examination: what is asked.
        url: base URL of the server.
        name: name under which it serves the model.
        tokenizer: checkpoint with the tokenizer.
        max_length: tokens of a prompt with its answer that the server takes.
        folder: where lm-eval writes its results.
    """
    arguments = [
        # Requests go out one after the other, so that batches are the same in every run.
        f"model={name}", f"base_url={url}/v1/completions", f"tokenizer={tokenizer}", "tokenizer_backend=huggingface",
        "num_concurrent=1", "max_retries=1", f"max_length={max_length}", "timeout=600",
    ]  # fmt: skip
    line = [
        sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", ",".join(arguments),
        "--tasks", ",".join(examination.tasks), "--batch_size", str(examination.batch_size), "--seed", "0",
        "--gen_kwargs", "temperature=0", "--log_samples", "--output_path", str(folder),
    ]  # fmt: skip
    if examination.include_path is not None:
        line += ["--include_path", str(examination.include_path)]
    if examination.limit is not None:
        line += ["--limit", str(examination.limit)]
    if examination.num_fewshot is not None:
        line += ["--num_fewshot", str(examination.num_fewshot)]
    return line


def examine(line: Sequence[str], offline: bool, log: Path, timeout: float, progress: Callable[[float, str], None]) -> None:
    """Run lm-eval to its end.

    Args:
        line: the command line.
        offline: whether the hub must not be asked.
        log: file for its output.
        timeout: seconds that it may take.
        progress: called about once a second with seconds and the last line of output.

    Raises:
        PlacementError: when it fails or takes too long.
    """
    env = {**os.environ, **(OFFLINE if offline else {}), "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with open(log, "wb") as handle:
        process = subprocess.Popen(line, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    try:
        while process.poll() is None:
            seconds = time.monotonic() - began
            if seconds > timeout:
                raise PlacementError(f"lm-eval was not ready after {timeout:.0f} s: give it more with --timeout, or less to ask with --limit")
            progress(seconds, last_line(log))
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise PlacementError(f"lm-eval ended with code {process.returncode}:\n{tail}")


def last_line(log: Path) -> str:
    """The newest line of a log, which a progress bar may have rewritten many times."""
    return log.read_text(errors="replace").rstrip().replace("\r", "\n").rpartition("\n")[2]
