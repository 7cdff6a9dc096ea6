"""``vllm serve --headless`` on the CPU build, whose console command cannot run: it asks for a distribution named ``vllm`` and, on CPUs
without AVX-512, preloads the wrong kernels (illegal instruction).

    python -m tests.support.vllm_headless --headless --model MODEL ...
"""

from __future__ import annotations


def parser():
    """Of ``vllm serve``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def main() -> None:
    import vllm.entrypoints.cli.serve as serve

    args = parser().parse_args()
    args.api_server_count = 0
    serve.run_headless(args)


if __name__ == "__main__":
    main()
