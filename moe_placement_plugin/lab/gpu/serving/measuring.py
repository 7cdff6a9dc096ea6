"""Measure servers that are up together: their answers, workloads in turns, kernels."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from .... import PlacementError
from ...servers.engines import SERVING_ENGINES, Completion
from ...servers.server import Server
from . import kernels
from .answers import ALTERNATIVES, ANSWERED, ASKED, difference
from .contestants import CONTESTANTS, LARGEST_STEP, Contestant, Setup
from .engine_clock import EngineClock
from .journal import Journal
from .models import Model
from .prediction import Predictor
from .report import by_load, disturbed_in_words, kernel_table, prediction_in_words, table
from .traffic import WORKLOADS, drive, post
from .warm import unlike, warm


@dataclass(frozen=True)
class Measuring:
    """Measure one run's servers.

    Attributes:
        given: the command line.
        workloads: names of what is measured.
        model: what is served.
        setup: what all servers share.
        journal: where figures are kept.
        folder: of the run.
        predictor: what the cost model says, None without calibrations.
    """

    given: argparse.Namespace
    workloads: list[str]
    model: Model
    setup: Setup
    journal: Journal
    folder: Path
    predictor: Predictor | None = None

    def compare_answers(self, servers: dict[str, Server]) -> dict:
        """Compare every server's greedy answers with the first one's.

        A server that does not give them is left out.

        Raises:
            PlacementError: when the first does not, which the others are compared with.
        """
        engine = SERVING_ENGINES[self.given.engine]
        prompts = WORKLOADS["tiny"].prompts(self.model.size.vocab, 7)[:ASKED]

        def asked(server: Server) -> list[Completion]:
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
                self.journal.fail(f"{name}: {error}; its log ends: {server.tail(3)}")
                if not answers:
                    raise
        reference = next(iter(answers.values()))
        return {name: difference(found, reference) for name, found in answers.items()}

    def measure(self, servers: dict[str, Server], found: dict) -> dict[str, Server]:
        """Measure every workload in turns; return the servers that answered in all rounds.

        Args:
            servers: name -> server, the one that the others are compared with first.
            found: of the batch; ``rounds`` and ``predicted`` are added to.
        """
        journal = self.journal
        if self.workloads:
            self._warm(servers)
        if self.given.engine == "sglang":
            self._freeze_garbage(servers)
        for workload in self.workloads:
            figures = found["rounds"].setdefault(workload, {name: [] for name in servers})
            rounds = self._rounds(workload, servers, figures)
            servers = {name: server for name, server in servers.items() if name in rounds}
            journal.console.print(table(workload, rounds, found["answers"]))
            journal.say("  " + disturbed_in_words(rounds))
            if self.predictor is not None:
                found["predicted"][workload] = self.predictor.throughput(workload, rounds)
                journal.say("  " + prediction_in_words(found["predicted"][workload]))
            journal.save()
        return servers

    def _freeze_garbage(self, servers: dict[str, Server]) -> None:
        """Keep what SGLang's servers have made by now out of their garbage collections.

        Those take a tenth of a second and more where PyTorch is loaded: vLLM sees to it by itself,
        and SGLang from 0.5.20 on.
        """
        for name, server in servers.items():
            try:
                post(f"{server.url}/freeze_gc", {})
            except OSError as error:
                self.journal.say(f"{name} may stop to collect garbage: {error}")

    def _warm(self, servers: dict[str, Server]) -> None:
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
            self.journal.say(f"{name} may stop to compile kernels: {why}")

    def _rounds(
        self, workload: str, servers: dict[str, Server], found: dict[str, list[dict]]
    ) -> dict[str, list[dict]]:
        """Add the figures of each round by server, and save them as they come.

        One slow server must not lose those of the others; one that failed is not asked again.

        Returns:
            The figures of the servers that answered in all rounds.

        Raises:
            RuntimeError: when the first server fails, which the others are compared with.
        """
        left = dict(servers)
        # The first only warms up.
        for number in range(-1, self.given.repeats):
            for name in list(left) if number % 2 == 0 else list(reversed(left)):
                try:
                    figures = self._round(workload, left[name], number)
                except RuntimeError as error:
                    self.journal.fail(f"{name} failed in {workload}: {error}")
                    if name == next(iter(servers)):
                        raise
                    left.pop(name)
                    continue
                if number >= 0:
                    found[name].append(figures)
                    self.journal.save()
        return {name: found[name] for name in left}

    def _round(self, workload: str, server: Server, number: int) -> dict[str, float | None]:
        """Measure one server in one round; -1 warms up.

        It has as many under way and short answers.
        """
        full, vocab = WORKLOADS[workload], self.model.size.vocab
        if number < 0:
            full = replace(
                full,
                requests=min(full.requests, 2 * full.concurrency),
                answer=max(1, full.answer // 8),
            )
        # A server that waited for its turn answers its first requests late; the one that had the
        # last turn of the round before did not wait.
        drive(server.url, WORKLOADS["tiny"], vocab, 1000 + number)
        clock = EngineClock(self.given.engine, server.url, server.log)
        before = clock.read()
        figures = drive(server.url, full, vocab, 100 + number).figures()
        return figures | {"engine_tpot": clock.per_token(before)}

    def profile(self, servers: dict[str, Server]) -> dict:
        """Return what each server's kernels take, by load; where a profile fails that is told."""
        found: dict[str, dict] = {}
        for name, server in servers.items():
            profiled = kernels.ProfiledServer(
                server.url,
                self.given.engine,
                self.traces(CONTESTANTS[name]),
                self.setup.started,
                self.given.cpu,
            )
            for load in kernels.LOADS:
                try:
                    measured = kernels.profile(profiled, load, self.model.size.vocab)
                    found.setdefault(name, {})[load] = measured
                except (PlacementError, RuntimeError, OSError) as error:
                    self.journal.fail(f"{name} was not profiled, {load}: {error}")
        for load, of in by_load(found).items():
            self.journal.console.print(kernel_table(load, of))
        return found

    def traces(self, one: Contestant) -> Path:
        """Return the folder that a server's profiler writes to."""
        return self.folder / "traces" / one.file
