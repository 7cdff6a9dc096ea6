"""Start real processes over gloo, forked from a server that has torch and kernels loaded."""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.support import forkserver

_numbers = itertools.count()


class Ranks:
    """Starts processes and gathers what they return.

    The store lives in this process, so that it outlives every rank.
    """

    def __init__(self):
        from torch.distributed import TCPStore

        self._context = forkserver.context()
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(
        self, function: Callable[..., Any], world: int, *args, timeout: float = 60, meanwhile=None
    ) -> list[Any]:
        """``function(rank, world, store, *args)`` in ``world`` processes of one gloo group.

        Args:
            meanwhile: called with the processes and their store while they run.

        Returns:
            What each returned; None for one that was killed, or crashed: who may be missing is the
            caller's to check.

        Raises:
            AssertionError: when one raised, or did not end in time.
        """
        from torch.distributed import PrefixStore

        name = f"run-{os.getpid()}-{next(_numbers)}"
        processes, pipes = [], []
        stacks = tempfile.TemporaryDirectory()
        for rank in range(world):
            here, there = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=_child,
                args=(function, rank, world, self.store.port, name, there, stacks.name, args),
                daemon=True,
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            if meanwhile is not None:
                meanwhile(processes, PrefixStore(name, self.store))
            deadline = time.monotonic() + timeout
            results = []
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    stuck = _stacks(processes, stacks.name)
                    raise AssertionError(
                        f"rank {rank} did not end within {timeout} s; where it and the others "
                        f"wait:\n{stuck}"
                    )
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "killed", None
                assert kind != "error", (
                    f"rank {rank}:\n{value}\nwhere the others "
                    f"are:\n{_stacks(processes, stacks.name)}"
                )
                results.append(value)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()
            stacks.cleanup()


def _stacks(processes: list[Any], folder: str) -> str:
    """What the threads of the processes that run still are doing."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return "\n".join(
        f"{path.name}:\n{path.read_text()}"
        for path in sorted(Path(folder).iterdir())
        if path.stat().st_size
    )


def _child(function, rank, world, port, name, pipe, stacks, args) -> None:
    import torch.distributed as dist

    # Open for as long as the process lives.
    faulthandler.register(signal.SIGUSR1, open(f"{stacks}/rank-{rank}", "w"))  # noqa: SIM115
    try:
        client = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
        )
        store = dist.PrefixStore(name, client)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=30),
        )
        # Nobody's connections are complete because this rank's are, and one that ends early would
        # leave the others waiting for it.
        if store.add("connected", 1) == world:
            store.set("all connected", "")
        store.wait(["all connected"], timedelta(seconds=30))
        answer = ("done", function(rank, world, store, *args))
    except BaseException:
        answer = ("error", traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    # Connections of a broken group are not worth waiting for.
    os.kill(os.getpid(), signal.SIGKILL)
