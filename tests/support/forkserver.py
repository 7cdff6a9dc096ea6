"""Start the server that processes of tests are forked from.

It has torch and the compiled kernels loaded.

A program has one such server, and what it loads is settled by who starts it first: a server without
torch costs every process a second of importing it.
"""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing import forkserver

LOADED = [
    "tests.unit.exchange.warm",
    "tests.unit.lab.staged_layer.ranks",
    "tests.unit.planner.warm",
    "moe_placement_plugin.lab.bench.exchange.ranks",
]


def context() -> mp.context.ForkServerContext:
    """Return what to start processes with; the server runs."""
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(LOADED)
    forkserver.ensure_running()
    return made
