"""Go from checkpoints over a recording to batch after batch of servers that take turns."""

from __future__ import annotations

import argparse
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

from .... import ExpertLoad, PlacementError, __version__
from ....formats.load_file import read_load, write_load
from ....recording.recorder import IDLE
from ...bench.planner.run import machine
from ...servers.server import Server
from . import kernels, together
from .answers import ASKED
from .arguments import check_asked, wanted_contestants
from .checkpoints import write, write_even_twin
from .contestants import (
    BESIDES,
    BESIDES_EPLB,
    CACHE_TOKENS,
    CONTESTANTS,
    Contestant,
    Setup,
    batches,
    command,
)
from .journal import Journal
from .measuring import Measuring
from .models import MODELS
from .ports import ports
from .prediction import Predictor, costs
from .quiet import Quiet
from .report import answers_in_words, by_load, layers_in_words
from .routed import (
    check_recorded,
    compare_routed,
    place_static,
    routed_in_words,
    share_elsewhere,
)
from .server_logs import in_words, moved
from .traffic import WORKLOADS, drive

SELDOM, OFTEN = 1000, 20
"""Forward passes between two rebalances: while a workload is measured, while answers are compared.

An answer is a pass a token.
"""

MOST_AT_ONCE = 8
"""Servers that are up together when nothing else is said."""


class Run:
    """Run one engine and one model with all contestants.

    Args:
        given: the command line.
        folder: for checkpoints, the recording and logs.

    Attributes:
        model: what is served.
        setup: what all servers share.
        contestants: the servers that are compared.
        journal: what was found.
        measuring: measures servers that are up together.
        recording: file of the load that plans are made from.
    """

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder, self.model = given, folder, MODELS[given.model].cut(given.layers)
        folder.mkdir(parents=True, exist_ok=True)
        self.device = "cpu" if given.cpu else "cuda"
        self.dtype = getattr(torch, given.dtype or ("float32" if given.cpu else "bfloat16"))
        self.workloads = (
            [] if given.answers_only else given.workload or ["prefill", "decode", "mixed"]
        )
        self.setup = self._setup()
        check_asked(given)
        self.contestants = wanted_contestants(given)
        # Before a checkpoint is written for nothing.
        batches(self.contestants, given.at_once or MOST_AT_ONCE)
        self.recording = folder / "load.safetensors"
        self.ports = ports()
        self.quiet = Quiet(given.quiet)
        self.costs = costs(given.calibration or [])
        self.journal = Journal(given.json)
        self.measuring = Measuring(
            given, self.workloads, self.model, self.setup, self.journal, folder
        )

    def _setup(self) -> Setup:
        """Return what all servers share."""
        given = self.given
        asked = [WORKLOADS[name] for name in [*self.workloads, "tiny"]]
        if given.kernels and not given.cpu:
            asked += kernels.LOADS.values()
        longest = max(one.longest for one in asked)
        return Setup(
            engine=given.engine,
            ranks=given.ranks,
            layout=given.layout,
            cpu=given.cpu,
            dtype=str(self.dtype).removeprefix("torch."),
            graphs=not given.eager,
            memory=given.memory,
            interval=given.interval or (OFTEN if given.answers_only else SELDOM),
            length=max(1024, longest + 8),
            cache=self.model.cache_bytes(CACHE_TOKENS, given.ranks, self.dtype.itemsize),
            one_gpu=given.one_gpu,
            restless=given.answers_only,
        )

    def all(self) -> dict:
        """Go through every phase; return plain data, which is saved after each step."""
        self.journal.note("facts", self.facts())
        self.journal.note("router", self.make_models())
        self.journal.note("recorded", self.record())
        self.journal.note("batches", [])
        for contestants in self.batches():
            self.batch(contestants)
        return self.journal.result

    def facts(self) -> dict:
        """Return machine, versions and command."""
        words = (Path(word).name if "/" in word else word for word in sys.argv[1:])
        gpus = 0 if self.given.cpu else torch.cuda.device_count()
        found = {
            **machine(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plugin": __version__,
            self.given.engine: _engine_version(self.given.engine),
            "command": " ".join(["python -m moe_placement_plugin.lab.gpu.serving", *words]),
        }
        self.journal.say("; ".join(f"{k} {v}" for k, v in found.items()))
        return found

    def make_models(self) -> dict:
        """Write both checkpoints; return how far the router's shares are from the wanted ones."""
        load = read_load(self.given.load) if self.given.load else None
        made = write(self.folder / "model", self.model, load, self.dtype, self.device)
        write_even_twin(self.folder / "even", self.folder / "model", self.model, self.device)
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the servers need it
        apart = share_elsewhere(np.array(made["shares"]), np.array(made["reached"]))
        self.journal.say(
            f"checkpoint: router within {apart.max():.2%} of the recorded shares on its embeddings"
        )
        return {"wanted": made["shares"], "reached": made["reached"], "apart": apart.tolist()}

    def batches(self) -> list[list[Contestant]]:
        """Return the servers that are up together: as many as fit into the GPUs' memory.

        Raises:
            PlacementError: when even three do not.
        """
        most = self.given.at_once or MOST_AT_ONCE
        if self.given.cpu:
            return batches(self.contestants, most)
        free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(self.setup.gpus))
        files = (self.folder / "model").glob("*.safetensors")
        weights = sum(file.stat().st_size for file in files) / self.given.ranks

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
        given, router = self.given, self.journal.result["router"]
        if given.recorded is not None:
            write_load(read_load(given.recorded), self.recording)
        elif given.skip_recording:
            counts = np.rint(1e6 * np.array(router["reached"])).astype(np.int64)
            write_load(ExpertLoad(counts[None], tuple(self.model.moe_layers)), self.recording)
        else:
            with self.server(CONTESTANTS["linear"], self.recording) as server:
                for name in self.workloads or ["tiny"]:
                    drive(server.url, WORKLOADS[name], self.model.size.vocab, 1)
                _wait_for(self.recording, server)
        load = read_load(self.recording)
        check_recorded(load, self.model, given.recorded)
        self.placed = place_static(self.contestants, load, self.model, given.ranks)
        if self.costs:
            predictor = Predictor(
                self.costs, self.model, given.ranks, load, self.placed, self.contestants[0].name
            )
            self.measuring = replace(self.measuring, predictor=predictor)
        routed = compare_routed(load, np.array(router["wanted"]), self.placed)
        how = (
            "not recorded, planned from the router's own shares"
            if given.skip_recording
            else "recorded"
        )
        self.journal.say(f"{how}: {routed_in_words(routed)}")
        return routed

    def recorded_by(self, one: Contestant) -> Path:
        """Return the file that a contestant that records writes."""
        return self.folder / f"{one.file}.safetensors"

    def server(self, one: Contestant, record: Path | None = None) -> Server:
        """Make a contestant's server.

        Args:
            one: the contestant.
            record: file to record what is routed first, before anything is measured.
        """
        port = next(self.ports)
        model = self.folder / ("even" if one.even else "model")
        first = record is not None
        name = one.file + ("-first" if first else "")
        if one.recording and not first:
            record = self.recorded_by(one)
        if record is not None:
            # A recording that is there would be continued, whatever checkpoint it is of.
            record.unlink(missing_ok=True)
        load = self.recording if self.recording.exists() else None
        # What is routed is the same with either attention, and SGLang records with tensor-parallel
        # attention only.
        setup = replace(self.setup, layout="tp") if first else self.setup
        line, env = command(one, setup, model, load, port, record)
        if self.given.kernels and self.given.engine == "vllm":
            line = [*line, *kernels.vllm_arguments(self.measuring.traces(one))]
        return Server(line, port, env, self.folder / f"{name}.log", 400)

    def batch(self, contestants: Sequence[Contestant]) -> None:
        """Serve some contestants at once, and measure them."""
        journal = self.journal
        found: dict = {"answers": {}, "rounds": {}, "predicted": {}, "moved": {}}
        journal.result["batches"].append(found)
        with ExitStack() as stack:
            made = {one.name: self.server(one) for one in contestants}
            stack.callback(together.stop, list(made.values()))
            servers = together.start(made, self.given.starts, journal.say, journal.fail)
            ready = {name: len(server.output()) for name, server in servers.items()}
            found["answers"] = self.measuring.compare_answers(servers)
            servers = {
                name: server
                for name, server in servers.items()
                if name in found["answers"] or CONTESTANTS[name].even
            }
            for name, differs in found["answers"].items():
                journal.say(f"answers of {name}: {answers_in_words(differs, ASKED)}")
            journal.save()
            if self.workloads or self.given.kernels:
                with self.quiet.measuring():
                    servers = self._measure(servers, found)
            for name, server in servers.items():
                self._look_back(name, server, ready[name], found)
        journal.save()

    def _measure(self, servers: dict[str, Server], found: dict) -> dict[str, Server]:
        """Measure the servers' workloads and kernels; return those that answered in all rounds."""
        servers = self.measuring.measure(servers, found)
        if not self.given.kernels:
            return servers
        found["kernels"] = self.measuring.profile(servers)
        predictor = self.measuring.predictor
        if predictor is not None:
            found["layers"] = {
                load: predictor.layers(load, of) for load, of in by_load(found["kernels"]).items()
            }
            for load, of in found["layers"].items():
                self.journal.say("  " + layers_in_words(load, of))
        return servers

    def _look_back(self, name: str, server: Server, ready: int, found: dict) -> None:
        """Read from a server's log and recording what moved and what was routed meanwhile.

        Args:
            name: of the server.
            server: it.
            ready: characters of its log from before it answered.
            found: of the batch; ``moved`` and ``seen`` are added to.
        """
        found["moved"][name] = moved(server.output(), self.given.engine, ready)
        if words := in_words(found["moved"][name]):
            self.journal.say(f"{name}: {words}")
        one = CONTESTANTS[name]
        path = self.recorded_by(one)
        if one.recording and path.exists():
            wanted = np.array(self.journal.result["router"]["wanted"])
            found["seen"] = compare_routed(read_load(path), wanted, self.placed)
            self.journal.say(f"{name} saw: {routed_in_words(found['seen'])}")


def _wait_for(path: Path, server: Server, seconds: float = 30) -> None:
    """Wait until the recording holds what was answered.

    An idle server writes within two looks, and then no more.
    """
    end = time.monotonic() + seconds
    while not path.exists() or time.time() - path.stat().st_mtime < 2 * IDLE:
        if time.monotonic() > end:
            raise PlacementError(f"{path} was not written: {server.tail(5)}")
        time.sleep(0.5)


def _engine_version(name: str) -> str:
    """Return the engine's version, installed as a package or not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return __import__(name).__version__
