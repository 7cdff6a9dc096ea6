"""Run ``vllm serve --headless`` on the CPU build, whose console command cannot run.

It asks for a distribution named ``vllm`` and, on CPUs without AVX-512, preloads the wrong kernels
(illegal instruction).

    python -m tests.support.vllm_headless

Each line that it reads is a server to be: {"arguments": [...], "env": {...}, "log": FILE}. It is
forked from here, so that vLLM is imported once; its process id is written back.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback


def parser():
    """Return the parser of ``vllm serve``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def serve() -> None:
    """Serve until the head has ended."""
    import vllm.entrypoints.cli.serve as command
    from vllm.v1.executor import multiproc_executor

    from tests.support.warm_workers import WarmContext

    WarmContext.inherited().lend(multiproc_executor)
    args = parser().parse_args()
    args.api_server_count = 0
    command.run_headless(args)


def in_a_fork(asked: dict) -> int:
    """Fork a server; return its process id, which is its process group's too."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for ours, file in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(ours, file)
        os.environ.update(asked["env"])
        sys.argv[1:] = asked["arguments"]  # where the plugin looks for its flags
        serve()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    from tests.support.vllm_runner import IMPORTED
    from tests.support.warm_workers import WarmContext

    WarmContext(
        IMPORTED
    )  # imports what workers are forked with while this process imports what it forks
    import vllm.entrypoints.cli.serve  # noqa: F401
    from vllm.v1.executor import multiproc_executor  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # what has ended leaves nothing to be waited for
    for line in sys.stdin:
        print(in_a_fork(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
