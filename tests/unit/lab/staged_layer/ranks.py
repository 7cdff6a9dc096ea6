"""Start gloo ranks once, and run many cases."""

from __future__ import annotations

import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moe_placement_plugin.lab.staged_layer import EpGroup
from tests.support import forkserver

from . import cases

SIZES = (1, 2, 4, 8)


def serve(rank: int, world: int, store: str, pipe) -> None:
    """Join the groups, then answer (function name, case) until None comes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(size))) for size in SIZES if size <= world}
    while (job := pipe.recv()) is not None:
        function, case = job
        try:
            pipe.send((True, getattr(cases, function)(case, EpGroup(groups[case.ep]))))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Start eight processes, forked from one that has imported torch."""

    def __init__(self, world: int = 8):
        forked = forkserver.context()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(world):
            mine, theirs = forked.Pipe()
            process = forked.Process(target=serve, args=(rank, world, store, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def call(self, function: str, case: cases.Case) -> list:
        """Return ``cases.<function>(case, group)`` on the case's ranks, in order of rank."""
        pipes = self._pipes[: case.ep]
        for pipe in pipes:
            pipe.send((function, case))
        answers = [pipe.recv() for pipe in pipes]
        failed = [f"rank {r}: {what}" for r, (ok, what) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [what for _, what in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
