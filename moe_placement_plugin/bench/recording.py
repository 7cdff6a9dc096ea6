"""What ``--expert-load-record`` costs in tokens per second, on a real vLLM of this machine.

    python -m moe_placement_plugin.bench.recording [--rounds 12] [--model PATH]

Two engines run side by side, one recording and one not, and take turns (A B B A ...), so that both sides see the same
machine. Prints the machine, the versions, both sides and the ratio with its spread. On a GPU both serve eight layers of Qwen3-30B-A3B's
shape with CUDA graphs, on a CPU a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Scale:
    """What is served, and how it is asked.

    Attributes:
        name: of the model, for the report.
        write: writes the model.
        engine: arguments of `vllm.LLM`.
        requests: per round.
        prompt: tokens of each, about.
        answer: tokens generated for each.
    """

    name: str
    write: Callable[[Path], Path]
    engine: dict[str, Any]
    requests: int
    prompt: int
    answer: int


def scales() -> dict[str, Scale]:
    """By device."""
    from ..demo.tiny_models import Size, write_qwen3_moe

    small = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 512, "enforce_eager": True}
    large = {
        "dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 128, "max_num_batched_tokens": 8192, "load_format": "dummy",
        # Two engines share the GPU.
        "gpu_memory_utilization": 0.4,
    }  # fmt: skip
    shape = Size(hidden=2048, expert=768, layers=8, heads=32)
    return {
        "cpu": Scale("tiny Qwen3-MoE, 4 layers x 30 experts, random weights", write_qwen3_moe, small, 16, 48, 64),
        "cuda": Scale(
            "Qwen3-30B-A3B's shape, 8 layers x 128 experts, dummy weights, CUDA graphs",
            partial(write_qwen3_moe, num_experts=128, top_k=8, size=shape, weights=False), large, 128, 512, 128,
        ),
    }  # fmt: skip


class Side:
    """One engine in a child process that runs a round when told to.

    Args:
        model: the model.
        record: path of the recording, None for the side that does not record.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, model: str, record: str | None, device: str):
        arguments = json.dumps({"model": model, "record": record, "device": device})
        self.tokens_per_second: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--child", arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip

    def wait(self) -> str:
        """The next line that the child reports."""
        for line in self.process.stdout:
            if line.startswith("@ "):
                return line[2:].strip()
        raise SystemExit(f"the engine ended with {self.process.wait()}; its messages are above")

    def round(self) -> None:
        """Run one round and keep its tokens per second."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.tokens_per_second.append(float(self.wait()))

    def stop(self) -> None:
        """Let the child end by itself."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


def child(arguments: str) -> None:
    """An engine that generates a round's tokens for each line on stdin and reports tokens per second."""
    given = json.loads(arguments)
    extra = {} if given["record"] is None else {"expert_load_record": given["record"], "expert_load_interval": 1}
    from vllm import LLM, SamplingParams

    scale = scales()[given["device"]]
    llm = LLM(model=given["model"], enable_prefix_caching=False, additional_config=extra, **scale.engine)
    sampling = SamplingParams(temperature=0, max_tokens=scale.answer, ignore_eos=True)
    # A byte is a token.
    prompts = [(f"{i} " * scale.prompt)[: scale.prompt] for i in range(scale.requests)]

    def generate() -> float:
        began = time.perf_counter()
        answers = llm.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(a.prompt_token_ids) + len(a.outputs[0].token_ids) for a in answers)
        return tokens / (time.perf_counter() - began)

    generate()
    print("@ ready", flush=True)
    for _ in sys.stdin:
        print(f"@ {generate()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--model", help="an MoE model (default: a tiny one with random weights)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    import torch
    import vllm

    from .. import ExpertLoad, __version__

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = scales()[device]
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or str(scale.write(Path(folder) / "model"))
        record = str(Path(folder) / "load")
        sides = {}
        # One after the other: both look at how much memory of a GPU is free.
        for name, path in (("off", None), ("on", record)):
            sides[name] = Side(model, path, device)
            sides[name].wait()
        for number in range(given.rounds):
            for name in ("off", "on") if number % 2 == 0 else ("on", "off"):
                sides[name].round()
        for side in sides.values():
            side.stop()
        tokens = int(ExpertLoad.read(record).counts.sum())
    ratios = [on / off for on, off in zip(sides["on"].tokens_per_second, sides["off"].tokens_per_second)]
    ordered = sorted(ratios)
    where = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(f"machine: {platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}{where}")
    print(f"versions: vllm {vllm.__version__}, torch {torch.__version__}, moe-placement-plugin {__version__}, Python {platform.python_version()}")
    print(
        f"model: {given.model or scale.name}; {given.rounds} rounds each, in turns, of {scale.requests} requests of {scale.prompt} "
        f"tokens and {scale.answer} generated"
    )
    for name, side in sides.items():
        values = side.tokens_per_second
        print(f"recording {name:>3}: median {statistics.median(values):8.1f} tokens/s (least {min(values):.1f}, most {max(values):.1f})")
    quarter = len(ordered) // 4
    print(
        f"on / off: median {statistics.median(ratios):.4f}, middle half {ordered[quarter]:.4f} to {ordered[-1 - quarter]:.4f}; "
        f"{tokens} choices recorded"
    )


if __name__ == "__main__":
    main()
