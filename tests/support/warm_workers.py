"""Workers forked from a process that has imported their engine, which takes a spawned one 8 to 11 s of a start's 14 to 17.

Engines spawn their workers, and so do servers that tests start, and cases that are run alone; engines of several cases in a process need not.
Forked workers share the seeds of strings' hashes and of numpy's global generator: an order that differs between ranks shows with spawned ones only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, forkserver
from typing import Any

import psutil


class WarmContext(context.ForkServerContext):
    """As ``spawn`` to its caller: a process has this one for a parent and the environment of the moment it is made in.

    Args:
        modules: what the process that others are forked from imports; it is started here. No more than a spawned worker has imported when it loads
            plugins: it could else not be seen that a patch comes too late.
    """

    def __init__(self, modules: Sequence[str]):
        super().__init__()
        self.set_forkserver_preload(list(modules))
        forkserver.ensure_running()
        # SGLang ends all processes below its own when an engine is shut down: the next engine's workers come from the same one.
        server, found = forkserver._forkserver._forkserver_pid, psutil.Process.children
        psutil.Process.children = lambda self, recursive=False: [one for one in found(self, recursive) if one.pid != server]

    def Process(self, *, target: Callable, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **more: Any):  # noqa: N802
        return super().Process(target=_run, args=(os.getpid(), dict(os.environ), target, args, kwargs or {}), **more)


def _run(parent: int, environment: dict[str, str], target: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """In the process: what a spawned one would have from the start."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    # OpenMP is loaded and has read its variables.
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if cores := re.findall(r"\d+", environment.get("OMP_PLACES") or environment.get("GOMP_CPU_AFFINITY") or ""):
        os.sched_setaffinity(0, set(map(int, cores)))
    # SGLang's workers send their parent a signal when they fail.
    own, found = os.getpid(), psutil.Process.parent
    psutil.Process.parent = lambda self: psutil.Process(parent) if self.pid == own else found(self)
    target(*args, **kwargs)
