"""Real processes over gloo, forked from a server that has torch and the compiled kernels loaded already."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
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

    def run(self, function: Callable[..., Any], world: int, *args, timeout: float = 60, meanwhile=None) -> list[Any]:
        """``function(rank, world, store, *args)`` in ``world`` processes of one gloo group.

        Args:
            meanwhile: called with the processes and their store while they run.

        Returns:
            What each returned; None for one that was killed, or crashed: who may be missing is the caller's to check.

        Raises:
            AssertionError: when one raised, or did not end in time.
        """
        from torch.distributed import PrefixStore

        name = f"run-{os.getpid()}-{next(_numbers)}"
        processes, pipes = [], []
        for rank in range(world):
            here, there = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_child, args=(function, rank, world, self.store.port, name, there, args), daemon=True)
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
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} did not end within {timeout} s"
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    kind, value = "killed", None
                assert kind != "error", f"rank {rank}:\n{value}"
                results.append(value)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()


def _child(function, rank, world, port, name, pipe, args) -> None:
    import torch.distributed as dist

    try:
        client = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        store = dist.PrefixStore(name, client)
        dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=timedelta(seconds=30))
        answer = ("done", function(rank, world, store, *args))
    except BaseException:
        answer = ("error", traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    sys.stdout.flush()
    # Connections of a broken group are not worth waiting for.
    os.kill(os.getpid(), signal.SIGKILL)
