"""Serve one model with each placement and compare: tokens, balancedness, throughput, latency, the longest pause.

    python -m benchmarks.serving --engine vllm --ranks 2 --model qwen3-30b-a3b --load traces/deepseek_r1_prefill_in1024.json --json out.json

All servers are up at once and take turns, round after round in alternating order, so that they see the same machine. Checkpoints are made
here, with routers whose load follows the recorded one (``--load``); what is really served is recorded first, and ``eplb`` plans from that.
``ideal`` is the same model with a router that loads all experts alike. Without a GPU (``--cpu --model tiny --workload tiny``) it shows that it
works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moe_placement_plugin import ExpertLoad, Placement, PlacementError, __version__, get_strategy
from moe_placement_plugin.bench.planner import machine
from moe_placement_plugin.costmodel import find_calibration, fit
from moe_placement_plugin.demo.engines import DEMO_ENGINES, Answer
from moe_placement_plugin.demo.server import Server, free_port
from moe_placement_plugin.simulate import Cluster
from moe_placement_plugin.topology import Topology

from .checkpoints import MODELS, wanted_shares, write
from .contestants import CONTESTANTS, Contestant, Setup, command
from .prediction import layer_times, predict, step_tokens
from .traffic import WORKLOADS, drive

ASKED, ANSWERED = 12, 16
"""Prompts whose answers are compared, and tokens of each."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--load", type=Path, help="recorded load that the router follows; an even one without")
    parser.add_argument("--ranks", type=int, default=2, help="EP ranks")
    parser.add_argument("--layout", choices=("tp", "dp"), default="tp", help="tensor-parallel or data-parallel attention")
    parser.add_argument("--contestant", action="append", choices=CONTESTANTS, help="repeat; the first is what the others are compared with")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="repeat; default: prefill, decode, mixed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--memory", type=float, default=0.08, help="share of a GPU's memory that a vLLM server wants to find free")
    parser.add_argument("--interval", type=int, default=200, help="forward passes between two rebalances of EPLB")
    parser.add_argument("--starts", type=int, default=3, help="servers that start at once")
    parser.add_argument("--calibration", help="of `moe-placement bench layer`, to compare what it predicts with what is measured")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, help="where checkpoints, the recording and logs are kept")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    # The servers end with this process, also when a time limit ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = Run(given, given.folder or Path(folder)).all()
        except PlacementError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return 0


class Run:
    """One engine, one model, all contestants."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder, self.model = given, folder, MODELS[given.model]
        folder.mkdir(parents=True, exist_ok=True)
        dtype = torch.float32 if given.cpu else torch.bfloat16
        self.dtype, self.device = dtype, "cpu" if given.cpu else "cuda"
        self.setup = Setup(
            given.engine, given.ranks, given.layout, given.cpu, str(dtype).removeprefix("torch."), not given.eager, given.memory, given.interval
        )
        names = given.contestant or [
            "linear" if given.cpu else "stock",
            *(n for n in CONTESTANTS if n != "stock" and not (n == "linear" and given.cpu)),
        ]
        self.contestants = [CONTESTANTS[n] for n in names if given.engine in CONTESTANTS[n].engines]
        self.workloads = given.workload or ["prefill", "decode", "mixed"]
        self.console = Console(width=200, highlight=False)
        self.recording = folder / "load.safetensors"
        self.cost = fit(find_calibration(given.calibration).measurements) if given.calibration else None

    def all(self) -> dict:
        """Every phase; plain data."""
        words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
        facts = {
            **machine(),
            "gpus": [] if self.given.cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plugin": __version__,
            self.given.engine: _engine_version(self.given.engine),
            "command": " ".join(["python -m benchmarks.serving", *words]),
        }
        self.say("; ".join(f"{k} {v}" for k, v in facts.items()))
        result: dict = {"facts": facts, "router": self.make_models(), "recorded": self.record()}
        with ExitStack() as stack:
            servers = self.start(stack)
            result["answers"] = self.compare_answers(servers)
            result["rounds"] = self.rounds(servers)
        if self.cost is not None:
            result["predicted"] = {name: self.predict(name, result["rounds"][name]) for name in self.workloads}
        self.report(result)
        return result

    def say(self, text: str) -> None:
        self.console.print(text)

    def make_models(self) -> dict:
        """Writes both checkpoints; how far the router's shares are from the wanted ones."""
        load = ExpertLoad.read(self.given.load) if self.given.load else None
        made = write(self.folder / "model", self.model, load, self.dtype, self.device)
        write(self.folder / "even", self.model, None, self.dtype, self.device)
        apart = np.abs(np.array(made["shares"]) - np.array(made["reached"])).sum(axis=1) / 2
        self.say(f"checkpoint: router within {apart.max():.2%} of the recorded shares on its embeddings")
        return {"wanted": made["shares"], "apart": apart.tolist()}

    def record(self) -> dict:
        """Serve once with linear, record what is really routed, and place the experts by it."""
        self.recording.unlink(missing_ok=True)  # a recording that is there would be continued, whatever checkpoint it is of
        with self.server(CONTESTANTS["linear"], self.recording) as server:
            for name in self.workloads:
                drive(server.url, WORKLOADS[name], self.model.size.vocab, 1)
            _wait_for(self.recording, server)
        load = ExpertLoad.read(self.recording)
        self.recorded, self.placed = load, self.placements(load)
        total = load.total / np.maximum(load.total.sum(axis=1, keepdims=True), 1)
        wanted = wanted_shares(ExpertLoad.read(self.given.load) if self.given.load else None, self.model)
        apart = np.abs(total - wanted).sum(axis=1) / 2
        balance = {name: placement.overall_balancedness(load.total) for name, placement in self.placed.items()}
        self.say(f"recorded: {int(load.counts.sum())} choices, {apart.mean():.1%} of them elsewhere than in the recorded load; balancedness "
                 + ", ".join(f"{k} {v:.3f}" for k, v in balance.items()))  # fmt: skip
        return {"apart": apart.tolist(), "balancedness": balance}

    def server(self, one: Contestant, record: Path | None = None) -> Server:
        port = free_port()
        model = self.folder / ("even" if one.even else "model")
        load = self.recording if self.recording.exists() else None
        line, env = command(one, self.setup, model, load, port, record)
        name = one.name.replace(" ", "-") + ("-recording" if record else "")
        return Server(line, port, env, self.folder / f"{name}.log", 400)

    def start(self, stack: ExitStack) -> dict[str, Server]:
        """All servers; one that cannot start is reported and left out, unless it is the first."""
        made = [(one, self.server(one)) for one in self.contestants]

        def enter(server: Server) -> str | None:
            try:
                server.__enter__()
            except PlacementError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(self.given.starts) as pool:
            errors = list(pool.map(enter, [server for _, server in made]))
        servers = {}
        for (one, server), error in zip(made, errors):
            stack.callback(server.stop)
            if error is None:
                servers[one.name] = server
            else:
                self.say(f"{one.name} did not start: {error[-600:]}")
        if self.contestants[0].name not in servers:
            raise PlacementError(f"{self.contestants[0].name}, which the others are compared with, did not start")
        return servers

    def compare_answers(self, servers: dict[str, Server]) -> dict:
        """Greedy answers of every server against the first one's."""
        engine = DEMO_ENGINES[self.given.engine]
        prompts = WORKLOADS["tiny"].prompts(self.model.size.vocab, 7)[:ASKED]
        answers = {name: [engine.complete(server.url, "tiny", p, ANSWERED) for p in prompts] for name, server in servers.items()
                   if not CONTESTANTS[name].even}  # fmt: skip
        reference = answers[self.contestants[0].name]
        return {name: _difference(found, reference) for name, found in answers.items()}

    def rounds(self, servers: dict[str, Server]) -> dict:
        """workload -> contestant -> the figures of each round."""
        found: dict = {w: {name: [] for name in servers} for w in self.workloads}
        for workload in self.workloads:
            for number in range(-1, self.given.repeats):  # the first only warms up
                for name in servers if number % 2 == 0 else reversed(servers):
                    figures = drive(servers[name].url, WORKLOADS[workload], self.model.size.vocab, 100 + number).figures()
                    if number >= 0:
                        found[workload][name].append(figures)
        return found

    def placements(self, load: ExpertLoad) -> dict[str, Placement]:
        """Of the contestants whose placement stays. Without a strategy it is linear."""
        placed = {}
        for one in self.contestants:
            if not one.moving and not one.even:
                cluster = Cluster(Topology.even(self.given.ranks), one.redundant, self.model.groups or 1)
                placed[one.name] = get_strategy(one.strategy or "linear").place(cluster.request(load))
        return placed

    def predict(self, workload: str, rounds: dict) -> dict:
        """What the cost model says of each server, from what `record` saw; see `prediction`."""
        even = get_strategy("linear").place(Cluster(Topology.even(self.given.ranks)).request(self.recorded))
        tokens = step_tokens(workload, WORKLOADS[workload])
        layers = layer_times(self.placed, self.recorded.total, even, tokens, self.model.top_k, self.cost)
        measured = {name: float(np.median([r["tokens_per_s"] for r in rows])) for name, rows in rounds.items()}
        return {"step_tokens": tokens, "layer_us": layers, "servers": predict(layers, measured, self.contestants[0].name)}

    def report(self, result: dict) -> None:
        """A table per workload."""
        first = self.contestants[0].name
        for workload, by_name in result["rounds"].items():
            table = Table(title=f"{workload}: medians of {self.given.repeats} rounds in turns (least to most)", title_justify="left", box=None)
            for column in (
                "server",
                "tokens/s",
                f"over {first}",
                "of the ideal",
                "TTFT p50/p99, ms",
                "TPOT p50/p99, ms",
                "longest gap, ms",
                "answers",
            ):
                table.add_column(column, justify="left" if column == "server" else "right")
            speed = {name: np.array([r["tokens_per_s"] for r in rows]) for name, rows in by_name.items()}
            for name, rows in by_name.items():
                middle = {key: float(np.median([r[key] for r in rows])) for key in rows[0]}
                ratio, values = np.median(speed[name] / speed[first]), speed[name]
                ideal = f"{np.median(speed[name] / speed['ideal']):.3f}" if "ideal" in speed else ""
                answers = result["answers"].get(name)
                table.add_row(
                    name, f"{middle['tokens_per_s']:.0f} ({values.min():.0f} to {values.max():.0f})", f"{ratio:.3f}", ideal,
                    f"{middle['ttft_p50']:.1f} / {middle['ttft_p99']:.1f}", f"{middle['tpot_p50']:.2f} / {middle['tpot_p99']:.2f}",
                    f"{max(r['longest_gap'] for r in rows):.1f}",
                    "" if answers is None else f"{answers['different']} of {ASKED} differ, logprobs {answers['logprobs']:.1e}",
                )  # fmt: skip
            self.console.print(table)
            predicted = result.get("predicted", {}).get(workload)
            if predicted is not None:
                self.say("  " + _in_words(predicted))


def _in_words(predicted: dict) -> str:
    """One line of what the cost model predicted."""
    if not predicted["servers"]:
        return "cost model: no prediction, the first server's MoE layers and the ideal ones take the same time, or one of the two is missing"
    each = (f"{name} {p['predicted']:.0f} tokens/s ({p['error']:+.1%})" for name, p in predicted["servers"].items())
    return f"cost model, steps of {predicted['step_tokens']} tokens, between the first server and the ideal one: " + ", ".join(each)


def _difference(found: list[Answer], reference: list[Answer]) -> dict[str, float]:
    """Answers with another token, and how far log probabilities are apart up to and with the first one: at a near tie that is little."""
    different, gaps = 0, [0.0]
    for ours, theirs in zip(found, reference):
        same = [a == b for a, b in zip(ours.token_ids, theirs.token_ids)]
        different += not all(same)
        until = same.index(False) + 1 if False in same else len(same)
        gaps += [abs(a - b) for a, b in zip(ours.logprobs[:until], theirs.logprobs[:until])]
    return {"different": different, "logprobs": max(gaps)}


def _wait_for(path: Path, server: Server, seconds: float = 30) -> None:
    """Wait until the recording has been written after the last answer."""
    import time

    after, end = time.time() + 1, time.monotonic() + seconds
    while not path.exists() or path.stat().st_mtime < after:
        # An idle server writes nothing: another request makes it.
        drive(server.url, WORKLOADS["tiny"], 256, 3)
        if time.monotonic() > end:
            raise PlacementError(f"{path} was not written: {server.tail(5)}")
        time.sleep(0.5)


def _engine_version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return __import__(name).__version__


if __name__ == "__main__":
    raise SystemExit(main())
