"""Read and check the command line of ``python -m moe_placement_plugin.lab.gpu.serving``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .... import PlacementError
from .contestants import CONTESTANTS, Contestant
from .models import MODELS
from .traffic import WORKLOADS


def parse(description: str | None) -> argparse.Namespace:
    """Return what the command line asks for.

    Args:
        description: text above the options in ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m moe_placement_plugin.lab.gpu.serving",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_served(parser)
    _add_measured(parser)
    _add_planned(parser)
    _add_machine(parser)
    return parser.parse_args()


def _add_served(parser: argparse.ArgumentParser) -> None:
    """Add what is served, and by how many ranks."""
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
        help="where there is one GPU: 'shared' has all ranks on it, for right answers; 'lone' "
        "starts SGLang's rank 0 without the others, for a rank's own time, its answers being wrong",
    )


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """Add which servers are compared, and by what."""
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


def _add_planned(parser: argparse.ArgumentParser) -> None:
    """Add when experts move, and what plans are made from."""
    parser.add_argument(
        "--interval",
        type=int,
        help="forward passes between two rebalances of EPLB; default: 1000, since vLLM's own take "
        "seconds each, and with --answers-only 20, so that experts move between the answers",
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


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """Add how servers share the machine, and where everything is written."""
    parser.add_argument(
        "--at-once",
        type=int,
        help="most servers that are up at once and share the GPUs' memory; default: as many as "
        "fit, at most 8",
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
        help="a file that several runs on one host name: they measure one at a time, while none "
        "starts servers",
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


def wanted_contestants(given: argparse.Namespace) -> list[Contestant]:
    """Return the contestants that are asked for and that the engine has.

    Raises:
        PlacementError: when it has none of them.
    """
    # On CPUs stock vLLM dies with expert parallelism.
    names = given.contestant or [
        n for n, one in CONTESTANTS.items() if one.strategy or one.moving or not given.cpu
    ]
    contestants = [
        CONTESTANTS[n] for n in names if CONTESTANTS[n].exists(given.engine, given.layout)
    ]
    if not contestants:
        raise PlacementError(
            f"{given.engine} with --layout {given.layout} has none of {', '.join(names)}: "
            "name another --contestant"
        )
    if not given.contestant and given.cpu:
        contestants.sort(key=lambda one: one.name != "linear")
    return contestants


def check_asked(given: argparse.Namespace) -> None:
    """Refuse what one GPU, or none, cannot do.

    Raises:
        PlacementError: naming the options.
    """
    if given.cpu and (given.engine, given.layout) == ("sglang", "dp"):
        raise PlacementError(
            "--cpu --layout dp: SGLang's CPU engine has no data-parallel attention: "
            "give --layout tp, or --engine vllm"
        )
    if given.one_gpu == "lone" and (given.engine, given.layout) != ("sglang", "tp"):
        raise PlacementError(
            "--one-gpu lone: only SGLang with tensor-parallel attention can be started without "
            "its other ranks"
        )
    if given.one_gpu == "shared" and not (given.eager and given.answers_only):
        raise PlacementError(
            "--one-gpu shared: ranks that share a GPU have no CUDA graphs and no speed: "
            "give --eager --answers-only"
        )
