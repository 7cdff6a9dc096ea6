"""Measure what the staged MoE layer costs and what its chunking hides.

    python -m moe_placement_plugin.lab.gpu.staged_layer check
        right on this device? exits 1 if not
    python -m moe_placement_plugin.lab.gpu.staged_layer overhead --shape r1
        staged, in one piece, against the engine's own fused call
    torchrun --nproc-per-node 2 -m moe_placement_plugin.lab.gpu.staged_layer \\
        overlap --shape qwen3-235b-a22b

On a machine without a GPU everything runs in torch over gloo at ``--shape tiny``: it shows that the
script works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ...bench.layer.shapes import SHAPES
from .check import check
from .overhead import overhead
from .overlap import overlap
from .process import Process

MEASUREMENTS = {"check": check, "overhead": overhead, "overlap": overlap}


def main() -> int:
    """Run what the command line asks for and write it; 1 when the check fails."""
    arguments = _arguments()
    with torch.no_grad():
        process = Process(arguments)
        results = {what: MEASUREMENTS[what](process) for what in arguments.what}
    if process.group.rank == 0 and arguments.json:
        arguments.json.write_text(json.dumps({"facts": process.facts, **results}, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if results.get("check", True) else 1


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="staged_layer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", choices=list(MEASUREMENTS))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens per rank")
    parser.add_argument(
        "--ep", type=int, default=1, help="overhead: the share of one of so many ranks"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="overlap: in CUDA graphs, which hide the launches; the ring only",
    )
    parser.add_argument(
        "--ctas",
        type=int,
        help="overlap: most thread blocks of an NCCL kernel; its choice when left out",
    )
    parser.add_argument("--matmuls", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
