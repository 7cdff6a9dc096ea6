"""Serve stock on one rank and placed on two, and show that the answers are the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...core.errors import PlacementError
from ...core.load import ExpertLoad
from ...core.placement import Placement
from ...core.topology import Topology
from ...formats.load_file import read_load
from ...strategies import PlacementRequest, get_strategy
from ..servers.engines import Completion, Placed, ServingEngine, report_of_workers
from ..servers.server import Server, free_port

PROMPTS = (
    "Which expert lies where decides how long every rank waits.",
    "0 1 1 2 3 5 8 13 21 34 55 89 144",
    "def place(experts, ranks): return experts % ranks",
)
TOKENS = 24
RANKS = 2
LOGPROB_TOLERANCE = 1e-3
"""Greatest difference of a float32 log probability between one rank and two.

The order of additions differs between the two, which was seen to change log probabilities by less
than 1e-5; a wrong expert changes them by 0.1 and more.
"""

Progress = Callable[[str, float, str], None]


@dataclass(frozen=True)
class Demonstration:
    """Hold what the demonstration of one model found.

    Attributes:
        model: name of the model.
        strategy: the strategy that was served.
        stock: answers of the stock engine on one rank, one per prompt.
        placed: answers of the placed engine on two ranks.
        load: the expert load that the placed engine recorded.
        placement: the strategy's placement on two ranks.
        balancedness: strategy -> mean rank load / greatest rank load on the recorded load.
        placed_log: the line in which the engine's workers report the placement in force.
    """

    model: str
    strategy: str
    stock: list[Completion]
    placed: list[Completion]
    load: ExpertLoad
    placement: Placement
    balancedness: dict[str, float]
    placed_log: str

    @property
    def largest_logprob_difference(self) -> float:
        """Return the largest difference over all tokens of all prompts."""
        return max(
            float(np.abs(np.subtract(a.logprobs, b.logprobs)).max())
            if a.token_ids == b.token_ids
            else float("inf")
            for a, b in zip(self.stock, self.placed)
        )

    @property
    def equal(self) -> bool:
        """Return whether both engines gave the same tokens with the same log probabilities."""
        return self.largest_logprob_difference <= LOGPROB_TOLERANCE


def run(
    engine: ServingEngine,
    name: str,
    checkpoint: Path,
    strategy: str,
    folder: Path,
    progress: Progress,
    start_timeout: float = 240,
) -> Demonstration:
    """Serve ``checkpoint`` twice and compare.

    Args:
        engine: the engine.
        name: name of the model, for reports.
        checkpoint: directory of the model.
        strategy: strategy of the second server.
        folder: where logs and the recorded load go.
        progress: called with (what is being done, seconds waited, last line of the server's
            output).
        start_timeout: seconds that a server may take to start.

    Raises:
        PlacementError: when a server does not start, gives no answer or records nothing.
    """
    record = folder / f"{name}-load.safetensors"
    stock = _Service(
        f"{name}: stock {engine.name} on one rank",
        None,
        folder / f"{name}-stock.log",
        start_timeout,
    )
    placed = _Service(
        f"{name}: {engine.name} on {RANKS} ranks, {strategy}",
        Placed(strategy, RANKS, record=record),
        folder / f"{name}-placed.log",
        start_timeout,
    )
    answers = [_answers(engine, checkpoint, one, progress) for one in (stock, placed)]
    load = read_load(record).moe_layers()
    placements = {s: _place(s, load) for s in ("linear", "balanced", "zigzag", "eplb")}
    return Demonstration(
        name,
        strategy,
        answers[0],
        answers[1],
        load,
        placements.get(strategy) or _place(strategy, load),
        {s: p.overall_balancedness(load.total) for s, p in placements.items()},
        report_of_workers(placed.log),
    )


@dataclass(frozen=True)
class _Service:
    """Hold one way to serve the checkpoint.

    Attributes:
        what: what it is, for reports.
        placed: the placement, None for stock.
        log: file for the server's output.
        start_timeout: seconds that the server may take to start.
    """

    what: str
    placed: Placed | None
    log: Path
    start_timeout: float


def _answers(
    engine: ServingEngine, checkpoint: Path, service: _Service, progress: Progress
) -> list[Completion]:
    """Serve the checkpoint, ask all prompts, and wait for what is recorded of them.

    Raises:
        PlacementError: when the server does not start, gives no answer or records nothing.
    """
    port, what = free_port(), service.what
    command, env = engine.command(checkpoint, port, service.placed)
    starting = partial(progress, f"starting {what}")
    found = []
    with Server(command, port, env, service.log, service.start_timeout, starting) as server:
        began = time.monotonic()
        for index, prompt in enumerate(PROMPTS):
            asking = f"asking {what}: prompt {index + 1} of {len(PROMPTS)}"
            progress(asking, time.monotonic() - began, "")
            try:
                found.append(engine.complete(server.url, "tiny", prompt, TOKENS))
            except PlacementError as error:
                raise PlacementError(
                    f"{what}: {error}; its log ends:\n{server.tail(25)}"
                ) from error
        if service.placed is not None and service.placed.record is not None:
            _wait_for_load(service.placed.record, progress)
        progress(f"stopping {what}", time.monotonic() - began, "")
    return found


def _place(strategy: str, load: ExpertLoad) -> Placement:
    request = PlacementRequest(
        load.num_layers, load.num_experts, Topology(RANKS), layer_ids=load.layer_ids, load=load
    )
    return get_strategy(strategy).place(request)


def _wait_for_load(path: Path, progress: Progress, timeout: float = 60) -> None:
    """Wait until the recorder has written every answered token (it writes once a second)."""
    began = time.monotonic()
    least = len(PROMPTS) * TOKENS
    while (waited := time.monotonic() - began) < timeout:
        if path.exists() and read_load(path).counts.sum(axis=(0, 2)).max() >= least:
            return
        progress("waiting for the recorded load", waited, "")
        time.sleep(0.5)
    raise PlacementError(
        f"{path} was not written within {timeout:.0f} s of the requests: see the server's log "
        "beside it"
    )
