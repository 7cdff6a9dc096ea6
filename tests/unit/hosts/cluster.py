"""Start ranks on two hosts of `network`, in turn: neighbouring ranks never share one."""

from __future__ import annotations

import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from typing import Any

from tests.support.children import end_group, python_path

from ...integration.hosts.network import ROOT, Hosts

_ports = itertools.count(20_000)


class Cluster:
    """Keep processes that wait for jobs (`ranks`).

    Args:
        hosts: of which this takes two.
        world: ranks.
        first: number of the host with rank 0 and every second rank; the others lie on the next one.
    """

    def __init__(self, hosts: Hosts, world: int, first: int = 0):
        self.hosts, self.world, self.first = hosts, world, first
        self._said: list[queue.Queue] = []
        self._processes: list[subprocess.Popen] = []
        self.errors: list[list[str]] = [[] for _ in range(world)]
        environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        for rank in range(world):
            command = [
                sys.executable,
                "-m",
                "tests.unit.hosts.ranks",
                str(rank),
                str(world),
                hosts.address(first),
            ]
            process = subprocess.Popen(
                hosts.on(first + rank % 2, command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
            said: queue.Queue = queue.Queue()
            self._processes.append(process)
            self._said.append(said)
            threading.Thread(target=self._read, args=(process.stdout, said), daemon=True).start()
            threading.Thread(target=self._keep, args=(rank, process.stderr), daemon=True).start()
        self.each("started", 120)

    @staticmethod
    def _read(stream, said: queue.Queue) -> None:
        for line in stream:
            try:
                said.put(json.loads(line))
            except json.JSONDecodeError:
                continue  # torch's own words

    def _keep(self, rank: int, stream) -> None:
        for line in stream:
            self.errors[rank].append(line)

    def begin(self, job: str, **more: Any) -> None:
        """Give a job to all ranks."""
        for errors in self.errors:
            errors.clear()
        self.tell(json.dumps({"job": job, "port": next(_ports), **more}))

    def tell(self, line: str = "") -> None:
        """Send a line to every rank."""
        for rank in range(self.world):
            self.answer(rank, line)

    def answer(self, rank: int, line: str = "") -> None:
        """Send a line to one rank."""
        stdin = self._processes[rank].stdin
        stdin.write(line + "\n")
        stdin.flush()

    def each(self, key: str, limit: float) -> list[Any]:
        """Return what every rank says under ``key``, in order.

        Its other words until then are dropped, a failure is raised.
        """
        deadline = time.monotonic() + limit
        return [self.next(rank, key, deadline) for rank in range(self.world)]

    def next(self, rank: int, key: str, deadline: float) -> Any:
        """Return what a rank says next under ``key``."""
        while True:
            try:
                word = self._said[rank].get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"rank {rank} did not say {key}: {''.join(self.errors[rank])[-3000:]}"
                ) from None
            assert "failed" not in word or key == "failed", f"rank {rank}:\n{word['failed']}"
            if key in word:
                return word[key]
            if "ended" in word and key == "done":
                return None

    def wrote(self, rank: int, words: str, patience: float = 5) -> str:
        """Return what a rank wrote to stderr, once the words are there.

        They may be read later than what it says.
        """
        deadline = time.monotonic() + patience
        while words not in (found := "".join(self.errors[rank])):
            assert time.monotonic() < deadline, (
                f"rank {rank} did not write {words}: {found[-3000:]}"
            )
            time.sleep(0.05)
        return found

    def run(self, job: str, limit: float = 60, **more: Any) -> list[Any]:
        """Return what every rank's job did; None for one that was killed, or ended in silence."""
        self.begin(job, limit=limit, **more)
        return self.finish(limit)

    def finish(self, limit: float) -> list[Any]:
        """Wait for the end of the job at hand."""
        deadline = time.monotonic() + limit + 20
        results = []
        for rank in range(self.world):
            results.append(self.next(rank, "done", deadline))
            if results[-1] is not None:
                self.next(rank, "ended", deadline)
        return results

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.stdin.close()
            end_group(process)
