"""Measure what ``--expert-load-record`` costs in tokens per second, on a real vLLM.

    python -m moe_placement_plugin.lab.bench.recording.run [--rounds 64] [--model PATH]

Recording and not recording take turns (A B B A ...), so that both sides see the same machine; a
ratio is that of two rounds each. On a CPU one engine, a tiny model, is switched: two that do the
same differ by several percent there, by where their memory lies. A CUDA graph cannot be switched:
on a GPU two engines serve eight layers of Qwen3-30B-A3B's shape. The file is written every ten
seconds (a server's every minute). Prints the machine, the versions, both sides and the ratio with
its spread.
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

from ....formats.load_file import read_load

# A function is sent to the workers, which vLLM allows on request only.
_ENVIRONMENT = {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_INTERVAL = 10


@dataclass(frozen=True)
class Scale:
    """Say what is served, and how it is asked.

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
    """Return the scale of each device."""
    from ...demo.tiny_models import Size, write_qwen3_moe  # lazy: heavy

    small = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
    }
    large = {
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "load_format": "dummy",
        # Two engines share the GPU.
        "gpu_memory_utilization": 0.4,
    }
    shape = Size(hidden=2048, expert=768, layers=8, heads=32)
    return {
        "cpu": Scale(
            "tiny Qwen3-MoE, 4 layers x 30 experts, random weights",
            write_qwen3_moe,
            small,
            16,
            48,
            64,
        ),
        "cuda": Scale(
            "Qwen3-30B-A3B's shape, 8 layers x 128 experts, dummy weights, CUDA graphs",
            partial(write_qwen3_moe, num_experts=128, top_k=8, size=shape, weights=False),
            large,
            128,
            512,
            128,
        ),
    }


class Engine:
    """Run an engine in a child process that generates a round when told to.

    Args:
        model: the model.
        record: path of the recording, None for an engine that does not record.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, model: str, record: str | None, device: str):
        arguments = json.dumps({"model": model, "record": record, "device": device})
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--child", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_ENVIRONMENT},
        )
        self._wait()

    def _wait(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@ "):
                return line[2:].strip()
        raise SystemExit(f"the engine ended with {self.process.wait()}; its messages are above")

    def round(self, side: str) -> float:
        """Return the tokens per second of one round.

        ``side`` ("off", "on") is what an engine on a CPU switches to.
        """
        # OpenMP's threads of another engine spin for a while after its last round.
        time.sleep(0.3)
        assert self.process.stdin is not None
        self.process.stdin.write(f"{side}\n")
        self.process.stdin.flush()
        return float(self._wait())

    def stop(self) -> None:
        """Let the child end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Switch:
    """Take the recording of a vLLM worker away, and give it back.

    Without it the worker is as if ``--expert-load-record`` had not been given.

    Args:
        worker: of vLLM; without CUDA graphs.
    """

    def __init__(self, worker: Any):
        from ....engines.vllm import recording  # lazy: heavy

        self._attribute = recording._RECORDER
        self._runner = worker.model_runner
        self._recording = getattr(self._runner, self._attribute)
        self._captures = [
            (module.router, module.router.capture_fn)
            for module in self._runner.get_model().modules()
            if getattr(getattr(module, "router", None), "capture_fn", None) is not None
        ]
        if not self._captures:
            raise SystemExit("no router of this model reports its choices: nothing to switch")

    def __call__(self, on: bool) -> None:
        for router, capture in self._captures:
            router.set_capture_fn(capture if on else None)
        if on:
            setattr(self._runner, self._attribute, self._recording)
        elif hasattr(self._runner, self._attribute):
            delattr(self._runner, self._attribute)


def switch(worker: Any, on: bool) -> None:
    """Run in each worker."""
    if not hasattr(worker, "_moe_placement_switch"):
        worker._moe_placement_switch = Switch(worker)
    worker._moe_placement_switch(on)


def child(arguments: str) -> None:
    """Generate a round's tokens for each line on stdin, and report tokens per second."""
    given = json.loads(arguments)
    extra = (
        {}
        if given["record"] is None
        else {"expert_load_record": given["record"], "expert_load_interval": _INTERVAL}
    )
    from vllm import LLM, SamplingParams

    # The module as workers import it, not this process's __main__.
    from . import run

    scale = scales()[given["device"]]
    llm = LLM(
        model=given["model"], enable_prefix_caching=False, additional_config=extra, **scale.engine
    )
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
    for line in sys.stdin:
        if given["device"] == "cpu":
            llm.collective_rpc(run.switch, args=(line.strip() == "on",))
        print(f"@ {generate()}", flush=True)


def _ratios(on: list[float], off: list[float]) -> list[float]:
    """Return the ratios of tokens per second, one for each A B B A."""
    times = ([1 / a + 1 / b for a, b in zip(side[::2], side[1::2])] for side in (off, on))
    return [a / b for a, b in zip(*times)]


def measure(model: str, record: str, device: str, rounds: int) -> dict[str, list[float]]:
    """Measure tokens per second of ``rounds`` rounds with recording and without, in turns."""
    if device == "cpu":
        engine = Engine(model, record, device)
        engines = {"off": engine, "on": engine}
    else:  # One after the other: both look at how much memory of a GPU is free.
        engines = {
            name: Engine(model, path, device) for name, path in (("off", None), ("on", record))
        }
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for name in ("off", "on") if number % 2 == 0 else ("on", "off"):
            speeds[name].append(engines[name].round(name))
    for engine in set(engines.values()):
        engine.stop()
    return speeds


def print_speeds(speeds: dict[str, list[float]], tokens: int) -> None:
    """Print medians, spread and the ratio; ``tokens`` are the choices that were recorded."""
    for name, values in speeds.items():
        print(
            f"recording {name:>3}: median {statistics.median(values):8.1f} tokens/s (least "
            f"{min(values):.1f}, most {max(values):.1f})"
        )
    ratios = sorted(_ratios(speeds["on"], speeds["off"]))
    quarter = len(ratios) // 4
    print(
        f"on / off: median {statistics.median(ratios):.4f}, middle half {ratios[quarter]:.4f} to "
        f"{ratios[-1 - quarter]:.4f}; {tokens} choices recorded"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=64, help="of each engine, in pairs")
    parser.add_argument("--model", help="an MoE model (default: a tiny one with random weights)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rounds < 2 or given.rounds % 2:
        parser.error(f"--rounds {given.rounds}: rounds come in pairs, A B B A: give an even number")
    if given.child:
        child(given.child)
        return
    import torch
    import vllm

    from ...._version import __version__  # lazy: heavy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = scales()[device]
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or str(scale.write(Path(folder) / "model"))
        record = str(Path(folder) / "load")
        speeds = measure(model, record, device, given.rounds)
        tokens = int(read_load(record).counts.sum())
    where = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} CPUs, load average "
        f"{os.getloadavg()[0]:.1f}{where}"
    )
    print(
        f"versions: vllm {vllm.__version__}, torch {torch.__version__}, moe-placement-plugin "
        f"{__version__}, Python {platform.python_version()}"
    )
    print(
        f"model: {given.model or scale.name}; {given.rounds} rounds each, in turns, of "
        f"{scale.requests} requests of {scale.prompt} "
        f"tokens and {scale.answer} generated"
    )
    print_speeds(speeds, tokens)


if __name__ == "__main__":
    main()
