"""Fork the workers of an engine's server from a process that imports the engine meanwhile.

It is on ``PYTHONPATH``.

A server of vLLM's CPU build imports vLLM three times in a row, 10 s each: the API server, its
engine, the workers. Where what is asked of a server is its answers and not how it is started, they
need not follow each other (`tests.support.warm_workers`).
"""

import os
import runpy
import sys

_MODULES = {
    # What a spawned process of this server has imported before it loads plugins: all that the
    # server's own module imports, and what it runs.
    "vllm.entrypoints.openai.api_server": [
        "vllm.entrypoints.openai.api_server",
        "vllm.v1.engine.core",
        "vllm.v1.executor.multiproc_executor",
    ],
    "sglang.launch_server": ["sglang.launch_server", "sglang.srt.managers.scheduler"],
}


def _warm(modules):
    import multiprocessing
    from types import SimpleNamespace

    from wrapt import register_post_import_hook

    from tests.support.warm_workers import WarmContext

    warm = WarmContext(modules)

    def sglang(module):
        module.mp = SimpleNamespace(**vars(multiprocessing) | {"Process": warm.Process})

    register_post_import_hook(warm.lend, "vllm.v1.engine.utils")
    register_post_import_hook(warm.lend, "vllm.v1.engine.coordinator")
    register_post_import_hook(sglang, "sglang.srt.entrypoints.engine")


if "-m" in sys.orig_argv:
    _started = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if _started in _MODULES:
        _warm(_MODULES[_started])

# Python runs the first one that it finds: the next one is hidden by this.
for _folder in sys.path:
    _next = os.path.join(_folder, "sitecustomize.py")
    if os.path.exists(_next) and not os.path.samefile(_next, __file__):
        runpy.run_path(_next)
        break
