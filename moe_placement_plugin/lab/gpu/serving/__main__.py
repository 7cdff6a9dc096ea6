"""Serve one model with each placement and compare: tokens, balancedness, throughput, latency, the longest pause.

    python -m moe_placement_plugin.lab.gpu.serving --engine vllm --ranks 2 --model qwen3-30b-a3b \\
        --load examples/deepseek-r1/in8k_out1k.safetensors --json out.json

As many servers as ``--at-once`` says are up and take turns, round after round in alternating order, so that they see the same machine; each
batch of them has the first contestant and the ideal with it. Checkpoints are made here, with routers whose load follows the recorded one
(``--load``); what is really served is recorded first, and ``eplb`` plans from that. ``ideal`` is the same model with a router that loads all
experts alike. Without a GPU (``--cpu --model tiny --workload tiny``) it shows that it works, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from .... import PlacementError
from .checkpoints import MODELS
from .contestants import CONTESTANTS
from .run import Run
from .traffic import WORKLOADS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moe_placement_plugin.lab.gpu.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument(
        "--load", type=Path, help="recorded load that the router follows; an even one without"
    )
    parser.add_argument("--ranks", type=int, default=2, help="EP ranks")
    parser.add_argument(
        "--layout",
        choices=("tp", "dp"),
        default="tp",
        help="tensor-parallel or data-parallel attention",
    )
    parser.add_argument(
        "--one-gpu",
        choices=("shared", "lone"),
        help="where there is one GPU: 'shared' has all ranks on it, for right answers; 'lone' starts SGLang's rank 0 without the others, "
        "for a rank's own time, its answers being wrong",
    )
    parser.add_argument(
        "--contestant",
        action="append",
        choices=CONTESTANTS,
        help="repeat; the others are compared with the first; default: all",
    )
    parser.add_argument(
        "--workload",
        action="append",
        choices=WORKLOADS,
        help="repeat; default: prefill, decode, mixed",
    )
    parser.add_argument(
        "--answers-only", action="store_true", help="compare greedy answers and measure no workload"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="profile each server at the end: time per MoE layer by kernel",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument(
        "--memory",
        type=float,
        default=0.08,
        help="share of a GPU's memory that a vLLM server wants to find free",
    )
    parser.add_argument(
        "--interval",
        type=int,
        help="forward passes between two rebalances of EPLB; default: 1000, since vLLM's own take seconds each, and with --answers-only 20, so that "
        "experts move between the answers",
    )
    parser.add_argument(
        "--skip-recording",
        action="store_true",
        help="plan from the router's own shares: a server's start less",
    )
    parser.add_argument(
        "--recorded",
        type=Path,
        help="an earlier run's FOLDER/load.safetensors, of the same model and load: likewise",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16, with --cpu float32",
    )
    parser.add_argument("--layers", type=int, help="of the model; default: its own number")
    parser.add_argument(
        "--at-once",
        type=int,
        help="most servers that are up at once and share the GPUs' memory; default: as many as fit, at most 8",
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=max(1, (os.cpu_count() or 1) // 4),
        help="servers that start at once",
    )
    parser.add_argument(
        "--quiet",
        type=Path,
        help="a file that several runs on one host name: they measure one at a time, while none starts servers",
    )
    parser.add_argument(
        "--calibration",
        action="append",
        help="of `moe-placement bench layer`, one for prefill, one for decode: its errors",
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints, the recording and logs are kept"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    # The servers end with this process, also when a time limit ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Run(given, given.folder or Path(folder))
            run.all()
        except PlacementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
