"""Move experts between GPUs, against plain peer-to-peer copies and vLLM's own sync EPLB.

    torchrun --nproc-per-node 2 -m moe_placement_plugin.lab.gpu.exchange [--shape SHAPE]

Shapes: ``5-layer``, 5 layers of 64 + 8 experts of 17.3 MB in bfloat16; ``v2-lite``, the same
experts in the 26 layers of DeepSeek-V2-Lite; ``r1``, 4 layers of 64 + 8 experts of 44 MB, one byte
per parameter; ``tiny``, which shows on a machine without a GPU that it runs.

What is printed, medians of ``--repeats``:

- plain copies: ``tensor.copy_`` from one GPU's memory to the next one's, all GPUs at the same time
  (the copy engines over NVLink), and NCCL's send and receive of the same bytes in one piece;
- exchange, all: nearly every slot changes rank. Its bandwidth is what the busiest rank receives by
  the time from the plan to the last slot filled; once with experts sent, once with experts read in
  the other GPU's memory, where that can be seen, slot by slot in order and, "scattered", into slots
  in any order, so that hardly any two experts lie one behind the other at both ends;
- pause, for a load that has drifted: from the summed load to serving again. Ours: planning,
  decision, exchange, verification of the layers that changed. vLLM's, where it is installed: its
  default policy and its `rearrange_expert_weights_inplace` over torch_gloo (its default) and over
  torch_nccl, which verifies nothing. Maps are not counted on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import torch
import torch.distributed as dist

from ...bench.timing import device_facts
from .measurements import move_all, pause_ours, pause_vllm, plain_copies, ways
from .model import SHAPES, MovedModel


def main() -> int:
    """Measure what the command line asks for, print it on rank 0 and write it."""
    options = _arguments()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    model = MovedModel(SHAPES[options.shape])
    result = _measure(model, options)
    if model.rank == 0:
        show(result)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(result, file, indent=1)
    dist.destroy_process_group()
    return 0


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="exchange.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shape", choices=SHAPES, default="5-layer" if torch.cuda.is_available() else "tiny"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--ours",
        action="store_true",
        help="leave vLLM's exchange out, which takes a second and more each time over torch_gloo",
    )
    parser.add_argument("--json", help="write all figures to this file")
    return parser.parse_args()


def _measure(model: MovedModel, options: argparse.Namespace) -> dict:
    """Measure every way that experts can move in, plain copies, and vLLM where it is installed."""
    repeats = options.repeats
    result: dict = {
        "machine": device_facts(model.device),
        "shape": options.shape,
        "ranks": model.ranks,
    }
    result["all"], result["pause"] = {}, {}
    for way in ways(model):
        model.move(model.first)
        result["all"][way] = move_all(model, repeats)
        result["all"][f"{way}, scattered"] = move_all(model, repeats, scattered=True)
        result["pause"][f"ours, {way}"] = ours = pause_ours(model, repeats)
    result["plain"] = plain_copies(model, repeats, result["all"][way]["bytes"])
    best = result["plain"].get("peer copy", result["plain"]["send and receive"])
    for figures in result["all"].values():
        figures["share of plain copies"] = figures["bytes_per_s"] / best
    # The first waits for a GPU, the second sends over gloo too.
    rivals = ("torch_gloo", "torch_nccl") if model.device.type == "cuda" else ("torch_nccl",)
    try:
        for kind in () if options.ours else rivals:
            model.move(model.first)
            result["pause"][f"vLLM, {kind}"] = pause_vllm(model, repeats, kind)
    except ImportError as error:
        result["missing"] = f"vLLM: {error}"
    for name, figures in result["pause"].items():
        figures["of ours"] = figures["longest"] / ours["longest"]
        if name.startswith("vLLM"):
            import vllm

            result["vllm"] = vllm.__version__
    return result


def show(result: dict) -> None:
    """Print the figures."""
    print(
        json.dumps(result["machine"]),
        f"shape {result['shape']}, {result['ranks']} ranks",
        *([result["missing"]] if "missing" in result else []),
    )
    for way, every in result["all"].items():
        shares = (
            f"{every['bytes_per_s'] / rate:.0%} of {name}" for name, rate in result["plain"].items()
        )
        print(
            f"exchange, all, {way}: {every['bytes'] / 1e6:.1f} MB into the busiest rank in "
            f"{every['seconds'] * 1e3:.2f} ms = {every['bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{every['chunks']} chunks of at most {every['longest_chunk'] * 1e3:.2f} ms, "
            f"{every['staging_bytes'] / 1e6:.1f} MB of staging memory; " + ", ".join(shares)
        )
    for name, rate in result["plain"].items():
        print(f"plain copies, {name}: {rate / 1e9:.2f} GB/s")
    for name, figures in result["pause"].items():
        parts = ", ".join(
            f"{key} {figures[key] * 1e3:.2f}"
            for key in ("plan", "exchange", "verify")
            if key in figures
        )
        print(
            f"pause, {name}: {figures['seconds'] * 1e3:.2f} ms, "
            f"longest {figures['longest'] * 1e3:.2f} ms ({figures['of ours']:.1f}x ours), "
            f"{figures['bytes'] / 1e6:.1f} MB moved{'; ' + parts if parts else ''}"
        )


if __name__ == "__main__":
    sys.exit(main())
