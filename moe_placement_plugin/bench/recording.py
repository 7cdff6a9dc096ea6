"""What ``--expert-load-record`` costs in tokens per second, on a real vLLM of this machine.

    python -m moe_placement_plugin.bench.recording [--rounds 12] [--model PATH]

Two engines run side by side, one recording and one not, and take turns (A B B A ...), so that both sides see the same
machine. Prints the machine, the versions, both sides and the ratio with its spread.
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
from pathlib import Path

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class Side:
    """One engine in a child process that runs a round when told to.

    Args:
        model: the model.
        record: path of the recording, None for the side that does not record.
    """

    def __init__(self, model: str, record: str | None):
        arguments = json.dumps({"model": model, "record": record})
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

    llm = LLM(
        model=given["model"], dtype="float32", max_model_len=512, max_num_seqs=16, max_num_batched_tokens=512, enforce_eager=True,
        enable_prefix_caching=False, additional_config=extra,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    prompts = [f"{i} " * 24 for i in range(16)]

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
    import vllm

    from .. import ExpertLoad, __version__
    from ..demo.tiny_models import write_qwen3_moe

    with tempfile.TemporaryDirectory() as folder:
        model = given.model or str(write_qwen3_moe(Path(folder) / "model"))
        record = str(Path(folder) / "load")
        sides = {"off": Side(model, None), "on": Side(model, record)}
        for side in sides.values():
            side.wait()
        for number in range(given.rounds):
            for name in ("off", "on") if number % 2 == 0 else ("on", "off"):
                sides[name].round()
        for side in sides.values():
            side.stop()
        tokens = int(ExpertLoad.read(record).counts.sum())
    ratios = [on / off for on, off in zip(sides["on"].tokens_per_second, sides["off"].tokens_per_second)]
    ordered = sorted(ratios)
    print(f"machine: {platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    print(f"versions: vllm {vllm.__version__}, moe-placement-plugin {__version__}, Python {platform.python_version()}")
    print(f"model: {given.model or 'tiny Qwen3-MoE, 4 layers x 30 experts, random weights'}; {given.rounds} rounds each, in turns")
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
