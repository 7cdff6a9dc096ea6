"""The run: checkpoints, a recording, then batch after batch of servers that take turns."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from .... import ExpertLoad, Placement, PlacementError, __version__, get_strategy
from ....core.topology import Topology
from ....formats.load_file import read_load, write_load
from ....recording.recorder import IDLE
from ....simulation.cluster import Cluster
from ...bench.planner.run import machine
from ...servers.engines import DEMO_ENGINES, Answer
from ...servers.server import Server
from . import kernels, together
from .answers import ALTERNATIVES, ANSWERED, ASKED, difference
from .checkpoints import MODELS, write, write_even_twin
from .contestants import (
    BESIDES,
    BESIDES_EPLB,
    CACHE_TOKENS,
    CONTESTANTS,
    LARGEST_STEP,
    Contestant,
    Setup,
    batches,
    command,
)
from .engine_clock import EngineClock
from .ports import ports
from .prediction import Predictor, costs
from .quiet import Quiet
from .report import (
    answers_in_words,
    balance_in_words,
    by_load,
    disturbed_in_words,
    kernel_table,
    layers_in_words,
    prediction_in_words,
    table,
)
from .server_logs import in_words, moved
from .traffic import WORKLOADS, drive, post
from .warm import unlike, warm

SELDOM, OFTEN = 1000, 20
"""Forward passes between two rebalances while a workload is measured, and while answers are compared, which are a pass a token."""
MOST_AT_ONCE = 8
"""Servers that are up together when nothing else is said."""


class Run:
    """One engine, one model, all contestants.

    Args:
        given: the command line.
        folder: for checkpoints, the recording and logs.
    """

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder, self.model = given, folder, MODELS[given.model].cut(given.layers)
        folder.mkdir(parents=True, exist_ok=True)
        self.device = "cpu" if given.cpu else "cuda"
        self.dtype = getattr(torch, given.dtype or ("float32" if given.cpu else "bfloat16"))
        self.workloads = (
            [] if given.answers_only else given.workload or ["prefill", "decode", "mixed"]
        )
        asked = [
            *(WORKLOADS[name] for name in [*self.workloads, "tiny"]),
            *(kernels.LOADS.values() if given.kernels and not given.cpu else ()),
        ]
        longest = max(one.longest for one in asked)
        self.setup = Setup(
            given.engine, given.ranks, given.layout, given.cpu, str(self.dtype).removeprefix("torch."), not given.eager, given.memory,
            given.interval or (OFTEN if given.answers_only else SELDOM),
            max(1024, longest + 8), self.model.cache_bytes(CACHE_TOKENS, given.ranks, self.dtype.itemsize),
            given.one_gpu, given.answers_only,
        )  # fmt: skip
        _check_asked(given)
        # On CPUs stock vLLM dies with expert parallelism.
        names = given.contestant or [
            n for n, one in CONTESTANTS.items() if one.strategy or one.moving or not given.cpu
        ]
        contestants = [
            CONTESTANTS[n] for n in names if CONTESTANTS[n].exists(given.engine, given.layout)
        ]
        if not contestants:
            raise PlacementError(
                f"{given.engine} with --layout {given.layout} has none of {', '.join(names)}: name another --contestant"
            )
        if not given.contestant and given.cpu:
            contestants.sort(key=lambda one: one.name != "linear")
        self.contestants = contestants
        batches(
            contestants, given.at_once or MOST_AT_ONCE
        )  # before a checkpoint is written for nothing
        self.console = Console(width=200, highlight=False)
        self.recording = folder / "load.safetensors"
        self.failed: list[str] = []
        self.ports = ports()
        self.quiet = Quiet(given.quiet)
        self.costs = costs(given.calibration or [])
        self.result: dict = {}

    def all(self) -> dict:
        """Every phase; plain data, which is saved after each step: a time limit loses no more than the last."""
        self.note("facts", self.facts())
        self.note("router", self.make_models())
        self.note("recorded", self.record())
        self.note("batches", [])
        for contestants in self.batches():
            self.batch(contestants)
        return self.result

    def note(self, key: str, value: object) -> None:
        """Keep a part of the result."""
        self.result[key] = value
        self.save()

    def save(self) -> None:
        """Write what there is so far."""
        if self.given.json:
            self.given.json.write_text(json.dumps(self.result, indent=1))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)  # a log's "[/..." is no markup

    def fail(self, text: str) -> None:
        """Keep and print what went wrong with one server; the others are measured."""
        self.failed.append(text)
        self.note("failed", self.failed)
        self.say(text)

    def facts(self) -> dict:
        """Machine, versions, command."""
        words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
        found = {
            **machine(),
            "gpus": []
            if self.given.cpu
            else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plugin": __version__,
            self.given.engine: _engine_version(self.given.engine),
            "command": " ".join(["python -m moe_placement_plugin.lab.gpu.serving", *words]),
        }
        self.say("; ".join(f"{k} {v}" for k, v in found.items()))
        return found

    def make_models(self) -> dict:
        """Writes both checkpoints; how far the router's shares are from the wanted ones."""
        load = read_load(self.given.load) if self.given.load else None
        made = write(self.folder / "model", self.model, load, self.dtype, self.device)
        write_even_twin(self.folder / "even", self.folder / "model", self.model, self.device)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the servers need it
        apart = _apart(np.array(made["shares"]), np.array(made["reached"]))
        self.say(
            f"checkpoint: router within {apart.max():.2%} of the recorded shares on its embeddings"
        )
        return {"wanted": made["shares"], "reached": made["reached"], "apart": apart.tolist()}

    def batches(self) -> list[list[Contestant]]:
        """The servers that are up together: as many as fit into the GPUs' memory.

        Raises:
            PlacementError: when even three do not.
        """
        most = self.given.at_once or MOST_AT_ONCE
        if self.given.cpu:
            return batches(self.contestants, most)
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(self.setup.gpus))
        weights = (
            sum(file.stat().st_size for file in (self.folder / "model").glob("*.safetensors"))
            / self.given.ranks
        )

        def takes(one: Contestant) -> float:
            rank = (
                weights * (1 + one.redundant / self.model.experts)
                + self.setup.cache
                + (BESIDES_EPLB if one.moving else BESIDES)
            )
            return rank * self.setup.started / self.setup.gpus

        return batches(self.contestants, most, takes, free)

    def record(self) -> dict:
        """Serve once with linear, record what is really routed, and place the experts by it."""
        if self.given.recorded is not None:
            recorded = read_load(self.given.recorded)
            write_load(recorded, self.recording)
        elif self.given.skip_recording:
            counts = np.rint(1e6 * np.array(self.result["router"]["reached"])).astype(np.int64)
            write_load(ExpertLoad(counts[None], tuple(self.model.moe_layers)), self.recording)
        else:
            with self.server(CONTESTANTS["linear"], self.recording) as server:
                for name in self.workloads or ["tiny"]:
                    drive(server.url, WORKLOADS[name], self.model.size.vocab, 1)
                _wait_for(self.recording, server)
        load = read_load(self.recording)
        self.check_recorded(load)
        self.placed = self.placements(load)
        self.predictor = Predictor(
            self.costs, self.model, self.given.ranks, load, self.placed, self.contestants[0].name
        )
        how = (
            "not recorded, planned from the router's own shares"
            if self.given.skip_recording
            else "recorded"
        )
        routed = self.routed(load)
        self.say(f"{how}: {_routed_in_words(routed)}")
        return routed

    def routed(self, load: ExpertLoad) -> dict:
        """How far what was routed is from what the routers were made for, layer by layer, and the static placements' balancedness under it."""
        total = load.total / np.maximum(load.total.sum(axis=1, keepdims=True), 1)
        apart = _apart(total, np.array(self.result["router"]["wanted"]))
        balance = {
            name: placement.overall_balancedness(load.total)
            for name, placement in self.placed.items()
        }
        return {"choices": int(load.counts.sum()), "apart": apart.tolist(), "balancedness": balance}

    def seen(self, one: Contestant) -> ExpertLoad | None:
        """What a server with --expert-load-record has recorded so far; None of another, or when there is nothing yet."""
        path = self.recorded_by(one)
        return read_load(path) if one.recording and path.exists() else None

    def check_recorded(self, load: ExpertLoad) -> None:
        """Refuse a recording of another model.

        Raises:
            PlacementError: naming both.
        """
        ours, theirs = (
            (len(self.model.moe_layers), self.model.experts),
            (load.num_layers, load.num_experts),
        )
        if ours != theirs:
            raise PlacementError(
                f"--recorded {self.given.recorded}: {theirs[0]} layers x {theirs[1]} experts, the model has {ours[0]} x {ours[1]}: give the "
                "load.safetensors of a run with the same --model and --load, or leave it out"
            )

    def placements(self, load: ExpertLoad) -> dict[str, Placement]:
        """Of the contestants whose placement stays. Without a strategy it is linear."""
        placed = {}
        for one in self.contestants:
            if not one.moving and not one.even:
                cluster = Cluster(
                    Topology.even(self.given.ranks), one.redundant, self.model.groups or 1
                )
                placed[one.name] = get_strategy(one.strategy or "linear").place(
                    cluster.request(load)
                )
        return placed

    def recorded_by(self, one: Contestant) -> Path:
        """Where a contestant that records does so."""
        return self.folder / f"{one.file}.safetensors"

    def server(self, one: Contestant, record: Path | None = None) -> Server:
        port = next(self.ports)
        model = self.folder / ("even" if one.even else "model")
        first = record is not None
        name = one.file + ("-first" if first else "")
        if one.recording and not first:
            record = self.recorded_by(one)
        if record is not None:
            record.unlink(
                missing_ok=True
            )  # a recording that is there would be continued, whatever checkpoint it is of
        load = self.recording if self.recording.exists() else None
        # What is routed is the same with either attention, and SGLang records with tensor-parallel attention only.
        setup = replace(self.setup, layout="tp") if first else self.setup
        line, env = command(one, setup, model, load, port, record)
        if self.given.kernels and self.given.engine == "vllm":
            line = [*line, *kernels.vllm_arguments(self.traces(one))]
        return Server(line, port, env, self.folder / f"{name}.log", 400)

    def batch(self, contestants: Sequence[Contestant]) -> None:
        """Serve some contestants at once."""
        found: dict = {"answers": {}, "rounds": {}, "predicted": {}, "moved": {}}
        self.result["batches"].append(found)
        with ExitStack() as stack:
            made = {one.name: self.server(one) for one in contestants}
            stack.callback(together.stop, list(made.values()))
            servers = together.start(made, self.given.starts, self.say, self.fail)
            ready = {name: len(server.output()) for name, server in servers.items()}
            found["answers"] = self.compare_answers(servers)
            servers = {
                name: server
                for name, server in servers.items()
                if name in found["answers"] or CONTESTANTS[name].even
            }
            for name, differs in found["answers"].items():
                self.say(f"answers of {name}: {answers_in_words(differs, ASKED)}")
            self.save()
            if self.workloads or self.given.kernels:
                with self.quiet.measuring():
                    servers = self.measure(servers, found)
                    if self.given.kernels:
                        found["kernels"] = self.profile(servers)
                        if self.costs:
                            found["layers"] = {
                                load: self.predictor.layers(load, of)
                                for load, of in by_load(found["kernels"]).items()
                            }
                            for load, of in found["layers"].items():
                                self.say("  " + layers_in_words(load, of))
            for name, server in servers.items():
                found["moved"][name] = moved(server.output(), self.given.engine, ready[name])
                if words := in_words(found["moved"][name]):
                    self.say(f"{name}: {words}")
                if (seen := self.seen(CONTESTANTS[name])) is not None:
                    found["seen"] = self.routed(seen)
                    self.say(f"{name} saw: {_routed_in_words(found['seen'])}")
        self.save()

    def measure(self, servers: dict[str, Server], found: dict) -> dict[str, Server]:
        """Every workload in turns; the servers that answered in all rounds."""
        if self.workloads:
            self.warm(servers)
        if self.given.engine == "sglang":
            # What a server has made by now stays out of its garbage collections, which take a tenth of a second and more where PyTorch is loaded:
            # vLLM sees to it by itself, and SGLang from 0.5.20 on.
            for name, server in servers.items():
                try:
                    post(f"{server.url}/freeze_gc", {})
                except OSError as error:
                    self.say(f"{name} may stop to collect garbage: {error}")
        for workload in self.workloads:
            rounds = self.rounds(
                workload,
                servers,
                found["rounds"].setdefault(workload, {name: [] for name in servers}),
            )
            servers = {name: server for name, server in servers.items() if name in rounds}
            self.console.print(table(workload, rounds, found["answers"]))
            self.say("  " + disturbed_in_words(rounds))
            if self.costs:
                found["predicted"][workload] = self.predictor.throughput(workload, rounds)
                self.say("  " + prediction_in_words(found["predicted"][workload]))
            self.save()
        return servers

    def warm(self, servers: dict[str, Server]) -> None:
        """Have all kernels compiled: see `warm`."""
        asked = [WORKLOADS[name] for name in self.workloads]
        largest = min(LARGEST_STEP, max(one.concurrency * one.prompt for one in asked))
        longest = max(one.prompt for one in asked)
        urls = {name: server.url for name, server in servers.items()}
        ways = {
            less
            for name in servers
            for less in unlike(self.model.top_k, self.model.experts + CONTESTANTS[name].redundant)
        }
        for name, why in warm(urls, self.model.size.vocab, longest, largest, ways).items():
            self.say(f"{name} may stop to compile kernels: {why}")

    def compare_answers(self, servers: dict[str, Server]) -> dict:
        """Greedy answers of every server against the first one's; a server that does not give them is left out.

        Raises:
            PlacementError: when the first does not, which the others are compared with.
        """
        engine = DEMO_ENGINES[self.given.engine]
        prompts = WORKLOADS["tiny"].prompts(self.model.size.vocab, 7)[:ASKED]

        def asked(server: Server) -> list[Answer]:
            return [
                engine.complete(server.url, "tiny", prompt, ANSWERED, ALTERNATIVES)
                for prompt in prompts
            ]

        answers = {}
        for name, server in servers.items():
            if CONTESTANTS[name].even:
                continue
            try:
                answers[name] = asked(server)
            except PlacementError as error:
                self.fail(f"{name}: {error}; its log ends: {server.tail(3)}")
                if not answers:
                    raise
        reference = next(iter(answers.values()))
        return {name: difference(found, reference) for name, found in answers.items()}

    def rounds(
        self, workload: str, servers: dict[str, Server], found: dict[str, list[dict]]
    ) -> dict[str, list[dict]]:
        """Adds the figures of each round by server, and saves them as they come: one slow server must not lose those of the others.

        Returns:
            The figures of the servers that answered in all rounds. One that failed is not asked again.

        Raises:
            RuntimeError: when the first server fails, which the others are compared with.
        """
        left = dict(servers)
        full = WORKLOADS[workload]
        short = replace(
            full, requests=min(full.requests, 2 * full.concurrency), answer=max(1, full.answer // 8)
        )
        for number in range(
            -1, self.given.repeats
        ):  # the first only warms up, with as many under way and shorter answers
            for name in list(left) if number % 2 == 0 else list(reversed(left)):
                try:
                    # A server that waited for its turn answers its first requests late; the one that had the last turn of the round before
                    # did not wait.
                    drive(left[name].url, WORKLOADS["tiny"], self.model.size.vocab, 1000 + number)
                    clock = EngineClock(self.given.engine, left[name].url, left[name].log)
                    before = clock.read()
                    figures = drive(
                        left[name].url,
                        short if number < 0 else full,
                        self.model.size.vocab,
                        100 + number,
                    ).figures()
                    figures["engine_tpot"] = clock.per_token(before)
                except RuntimeError as error:
                    self.fail(f"{name} failed in {workload}: {error}")
                    if name == next(iter(servers)):
                        raise
                    left.pop(name)
                    continue
                if number >= 0:
                    found[name].append(figures)
                    self.save()
        return {name: found[name] for name in left}

    def profile(self, servers: dict[str, Server]) -> dict:
        """What each server's kernels take, by load; where a profile fails that is told."""
        found: dict[str, dict] = {}
        for name, server in servers.items():
            folder, vocab = self.traces(CONTESTANTS[name]), self.model.size.vocab
            for load in kernels.LOADS:
                try:
                    measured = kernels.profile(
                        server.url,
                        load,
                        self.given.engine,
                        folder,
                        vocab,
                        self.setup.started,
                        self.given.cpu,
                    )
                    found.setdefault(name, {})[load] = measured
                except (PlacementError, RuntimeError, OSError) as error:
                    self.fail(f"{name} was not profiled, {load}: {error}")
        for load, of in by_load(found).items():
            self.console.print(kernel_table(load, of))
        return found

    def traces(self, one: Contestant) -> Path:
        """Where a server's profiler writes."""
        return self.folder / "traces" / one.file


def _check_asked(given: argparse.Namespace) -> None:
    """
    Raises:
        PlacementError: when what is asked of one GPU, or of none, cannot be had of it.
    """
    if given.cpu and (given.engine, given.layout) == ("sglang", "dp"):
        raise PlacementError(
            "--cpu --layout dp: SGLang's CPU engine has no data-parallel attention: give --layout tp, or --engine vllm"
        )
    if given.one_gpu == "lone" and (given.engine, given.layout) != ("sglang", "tp"):
        raise PlacementError(
            "--one-gpu lone: only SGLang with tensor-parallel attention can be started without its other ranks"
        )
    if given.one_gpu == "shared" and not (given.eager and given.answers_only):
        raise PlacementError(
            "--one-gpu shared: ranks that share a GPU have no CUDA graphs and no speed: give --eager --answers-only"
        )


def _apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of each layer's choices that lie elsewhere, of two ``[layers, experts]`` of shares."""
    return np.abs(ours - theirs).sum(axis=1) / 2


def _routed_in_words(routed: dict) -> str:
    """One line of `Run.routed`."""
    elsewhere = (
        f"{np.mean(routed['apart']):.1%} of them elsewhere than in the load that the routers follow"
    )
    return f"{routed['choices']} choices, {elsewhere}; balancedness {balance_in_words(routed['balancedness'])}"


def _wait_for(path: Path, server: Server, seconds: float = 30) -> None:
    """Wait until the recording holds what was answered: an idle server writes within two looks, and then no more."""
    end = time.monotonic() + seconds
    while not path.exists() or time.time() - path.stat().st_mtime < 2 * IDLE:
        if time.monotonic() > end:
            raise PlacementError(f"{path} was not written: {server.tail(5)}")
        time.sleep(0.5)


def _engine_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return __import__(name).__version__
