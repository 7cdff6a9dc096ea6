"""Run planners in processes of their own, one case at a time, so that all stand side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ....core.errors import PlacementError

WORKER = Path(__file__).with_name("worker.py")
ENGINE_OF = {"vLLM default": "vllm", "SGLang deepseek": "sglang", "SGLang deepseek_vec": "sglang"}


@dataclass(frozen=True)
class Answer:
    """Hold what a planner did with a case.

    Attributes:
        table: int64 [layers, slots].
        seconds: float64 [repeats] of wall time.
        cpu_seconds: the same of CPU time, all threads.
    """

    table: np.ndarray
    seconds: np.ndarray
    cpu_seconds: np.ndarray

    @property
    def milliseconds(self) -> float:
        """Return the median time."""
        return float(np.median(self.seconds)) * 1e3


class Contestant:
    """Run one planner in one interpreter; a context manager.

    Attributes:
        name: key of `worker.PLANNERS`.
        versions: what it runs on.
    """

    def __init__(self, name: str, python: str = sys.executable):
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="planner-bench-")
        root = str(Path(__file__).parents[4])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        # The worker's own folder must not come first on its path: it holds modules named like
        # others.
        code = (
            f"import runpy, sys; sys.argv = [{str(WORKER)!r}, {name!r}]; "
            f"runpy.run_path({str(WORKER)!r}, run_name='__main__')"
        )
        self._log = open(Path(self._folder.name) / "stderr.txt", "w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [python, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            raise PlacementError(
                f"cannot start {python} for {name}: {error}; "
                "give the path of an interpreter that has the engine"
            ) from error
        hello = self._read()
        if "error" in hello:
            self.close()
            raise PlacementError(
                f"{name} does not import under {python}: {hello['error']}; "
                "give the interpreter that the engine is installed in"
            )
        self.versions: dict[str, str] = hello["versions"]

    def _read(self) -> dict[str, Any]:
        """Return the process's next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise PlacementError(
                f"the process of {self.name} ended without an answer:\n{self._log.read()[-2000:]}"
            )
        return json.loads(line)

    def ask(
        self,
        load: np.ndarray,
        slots: int,
        ranks: int,
        groups: int = 1,
        nodes: int = 1,
        repeats: int = 5,
        old: np.ndarray | None = None,
    ) -> Answer:
        """Plan for a load.

        Args:
            load: [layers, experts].
            slots: per layer.
            ranks: with equal slots.
            groups: of experts, each on one node.
            nodes: with equal ranks.
            repeats: timed calls.
            old: int [layers, slots], the placement in service; None for none.

        Raises:
            PlacementError: when the planner fails on this case.
        """
        source = Path(self._folder.name) / "load.npz"
        target = Path(self._folder.name) / "table.npy"
        arrays: dict[str, Any] = {"load": np.asarray(load, dtype=np.int64)}
        if old is not None:
            arrays["old"] = np.asarray(old, dtype=np.int64)
        np.savez(source, **arrays)
        request = {
            "load": str(source),
            "table": str(target),
            "slots": slots,
            "ranks": ranks,
            "groups": groups,
            "nodes": nodes,
            "repeats": repeats,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._read()
        if "error" in answer:
            raise PlacementError(f"{self.name} failed: {answer['error']}")
        return Answer(np.load(target), np.array(answer["seconds"]), np.array(answer["cpu_seconds"]))

    def again(self) -> tuple[float, float]:
        """Return the (wall, CPU) seconds that the last case takes once more."""
        print(json.dumps({"again": True}), file=self._process.stdin, flush=True)
        answer = self._read()
        return answer["seconds"][0], answer["cpu_seconds"][0]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._folder.cleanup()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def start_contestants(
    names: list[str], pythons: dict[str, str | None]
) -> tuple[list[Contestant], dict[str, str]]:
    """Start every planner that can be had.

    Args:
        names: keys of `worker.PLANNERS`.
        pythons: interpreter per engine ("vllm", "sglang"), None to use this one if it has the
            engine.

    Returns:
        (contestants, reason by name for those that are missing).

    Raises:
        PlacementError: if an interpreter that was named explicitly cannot run its engine.
    """
    started: list[Contestant] = []
    missing: dict[str, str] = {}
    try:
        for name in names:
            engine = ENGINE_OF.get(name)
            python = pythons.get(engine) if engine else None
            if engine and python is None and find_spec(engine) is None:
                missing[name] = f"{engine} is not installed here; give --{engine}-python"
                continue
            try:
                started.append(Contestant(name, python or sys.executable))
            except PlacementError as error:
                if python is not None or engine is None:
                    raise
                missing[name] = str(error)
    except BaseException:
        for contestant in started:
            contestant.close()
        raise
    return started, missing
