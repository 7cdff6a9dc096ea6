"""Run lm-eval in a child process of its own that is watched."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from ...core.errors import PlacementError
from .examiner import Candidate, Examination

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""What keeps lm-eval, datasets and transformers from asking the hub."""

LOADING_SECONDS = 600.0
"""Until lm-eval has loaded and found its tasks, which takes seconds, or a minute on a slow disk."""

Progress = Callable[[float, str], None]


class Examiner:
    """Hold lm-eval, loaded once, in a child process that ends with the ``with`` block.

    Args:
        examination: what it asks.
        offline: whether data sets must be on this machine already.
        log: file for its output.
        progress: called about once a second while it loads, with seconds and the last line of
            output.

    Raises:
        PlacementError: on entry, when lm-eval, the folder or a task is missing.
    """

    def __init__(self, examination: Examination, offline: bool, log: Path, progress: Progress):
        self.examination, self.offline, self.log, self.progress = (
            examination,
            offline,
            log,
            progress,
        )
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Examiner:
        for module in ("lm_eval", "tenacity", "aiohttp"):
            if find_spec(module) is None:
                raise PlacementError(
                    f"{module} is not installed in this environment, and lm-eval asks the "
                    "questions: pip install 'moe-placement-plugin[accuracy]'"
                )
        folder = self.examination.include_path
        if folder is not None and not Path(folder).is_dir():
            raise PlacementError(
                f"--include-path {folder} is no folder: give the folder with the task files"
            )
        env = {**os.environ, **(OFFLINE if self.offline else {}), "TOKENIZERS_PARALLELISM": "false"}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moe_placement_plugin.lab.accuracy.examiner"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
            )
        try:
            self._ask(asdict(self.examination), LOADING_SECONDS, self.progress)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def examine(self, candidate: Candidate, timeout: float, progress: Progress) -> None:
        """Ask a server all questions.

        Args:
            candidate: the server.
            timeout: seconds that all questions may take.
            progress: called about once a second with seconds and the last line of output.

        Raises:
            PlacementError: when lm-eval fails or takes too long.
        """
        self._ask(asdict(candidate), timeout, progress)

    def _ask(self, request: dict[str, Any], timeout: float, progress: Progress) -> None:
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        began = time.monotonic()
        while not select.select([process.stdout], [], [], 0.5)[0]:
            seconds = time.monotonic() - began
            if seconds > timeout:
                raise PlacementError(
                    f"lm-eval was not ready after {timeout:.0f} s: give it more with --timeout, or "
                    "ask less with --limit"
                )
            progress(seconds, self._last_line())
        reply = process.stdout.readline()
        if not reply:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise PlacementError(f"lm-eval ended with code {process.wait()}:\n{tail}")
        if problem := json.loads(reply).get("error"):
            raise PlacementError(problem)

    def _last_line(self) -> str:
        """Return the newest line of its output.

        A progress bar may have rewritten it many times.
        """
        return self.log.read_text(errors="replace").rstrip().replace("\r", "\n").rpartition("\n")[2]

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
