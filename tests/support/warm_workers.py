"""Fork workers from a process that has imported their engine.

A spawned one takes 8 to 11 s of a start's 14 to 17 for that.

Engines spawn their workers, and so do servers that tests start, and cases that are run alone;
engines of several cases in a process need not, nor servers of which only the answers are asked
(`WARM_SITE`). Forked workers share the seeds of strings' hashes and of numpy's global generator: an
order that differs between ranks shows with spawned ones only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, forkserver, reduction
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

WARM_SITE = Path(__file__).parent / "warm_site"
"""On ``PYTHONPATH``, this repository too: a server started with it has such workers."""


class WarmContext(context.ForkServerContext):
    """Start processes as ``spawn`` does to its caller, forked from one that is warm.

    A process has this one for a parent, its outputs, and the environment of the moment it is made
    in.

    Args:
        modules: what the process that others are forked from imports; it is started here. No more
            than a spawned worker has imported when it loads plugins: it could else not be seen that
            a patch comes too late.
    """

    def __init__(self, modules: Sequence[str]):
        super().__init__()
        self.set_forkserver_preload(list(modules))
        forkserver.ensure_running()
        # SGLang ends all processes below its own when an engine is shut down: the next engine's
        # workers come from the same one.
        server, found = forkserver._forkserver._forkserver_pid, psutil.Process.children
        psutil.Process.children = lambda self, recursive=False: [
            one for one in found(self, recursive) if one.pid != server
        ]

    @classmethod
    def inherited(cls) -> WarmContext:
        """Return the parent's context, for a process that was forked.

        It cannot wait for a sister.
        """
        forkserver._forkserver.ensure_running = lambda: None
        return cls.__new__(cls)

    def lend(self, module: ModuleType) -> None:
        """Have a module of vLLM start its processes so."""
        module.get_mp_context = lambda: self

    def Process(
        self,
        *,
        target: Callable,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ):  # noqa: N802
        return super().Process(
            target=_run,
            args=(os.getpid(), dict(os.environ), _Outputs(), target, args, kwargs or {}),
            **more,
        )


class _Outputs:
    """Send standard output and error to a process that this one starts."""

    def __reduce__(self):
        return _received, tuple(reduction.DupFd(output) for output in (1, 2))


def _received(*outputs: Any) -> list[int]:
    return [output.detach() for output in outputs]


def _run(
    parent: int,
    environment: dict[str, str],
    outputs: Sequence[int],
    target: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Give the process what a spawned one would have from the start, and run it."""
    import torch

    for theirs, ours in zip(outputs, (1, 2)):
        os.dup2(theirs, ours)
        os.close(theirs)
    os.environ.clear()
    os.environ.update(environment)
    # An engine in a process of its own has workers, too.
    if executor := sys.modules.get("vllm.v1.executor.multiproc_executor"):
        WarmContext.inherited().lend(executor)
    # OpenMP is loaded and has read its variables.
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if cores := re.findall(
        r"\d+", environment.get("OMP_PLACES") or environment.get("GOMP_CPU_AFFINITY") or ""
    ):
        os.sched_setaffinity(0, set(map(int, cores)))
    # SGLang's workers send their parent a signal when they fail.
    own, found = os.getpid(), psutil.Process.parent
    psutil.Process.parent = lambda self: psutil.Process(parent) if self.pid == own else found(self)
    target(*args, **kwargs)
