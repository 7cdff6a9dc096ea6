"""Describe the servers that are compared: one engine, one model, a placement each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .... import PlacementError
from ...servers.engines import SERVING_ENGINES, Placed, ServerSettings
from .. import one_gpu

OURS = {"min_gain": 0.02, "hysteresis": 0}
RESTLESS = {"min_gain": 0, "hysteresis": 0, "max_phase_loss": 0.5, "small_batches": False}
"""Experts move for any gain: where only answers are asked for, that they move is the point."""
MOST_REQUESTS = 128
"""Under way in a server at once, and the largest batch that CUDA graphs are captured for."""
LARGEST_STEP = 16384
"""Tokens that a server takes in one forward pass at most.

A layer of 8192 of Qwen3-30B-A3B's was 1.8 ms of kernels for two H200 and took 2.3 ms or more: the
GPUs waited for the host.
"""
CACHE_TOKENS = 90_112
"""Tokens whose keys and values each server holds.

More than any workload has under way at once, and little, since all servers share the GPUs.
"""
BESIDES, BESIDES_EPLB = 5 << 30, 8 << 30
"""Bytes of each GPU that a server takes besides weights and cache; the second with EPLB.

CUDA's context, NCCL, work space, graphs; EPLB has buffers and communicators of its own. 3.4 and 6.2
GiB were seen on an H100 with steps of half as many tokens.
"""

STREAMED = 8
"""Tokens that a server sends at once after the first.

A hundred streams of single tokens take more of its processors than the model of the GPUs.
"""


@dataclass(frozen=True)
class Contestant:
    """Describe one server.

    Attributes:
        name: as in the tables.
        strategy: our strategy; None for the engine without this plugin.
        redundant: redundant experts per layer.
        load: whether the strategy plans from the recorded load.
        moving: None, or how the engine's EPLB is switched on: ``sync`` or ``async``.
        even: serve the model whose router loads all experts alike, the ideal.
        recording: with ``--expert-load-record``.
        engines: where it exists.
    """

    name: str
    strategy: str | None = None
    redundant: int = 0
    load: bool = False
    moving: str | None = None
    even: bool = False
    recording: bool = False
    engines: tuple[str, ...] = ("vllm", "sglang")

    def exists(self, engine: str, layout: str) -> bool:
        """Return whether an engine has it.

        SGLang with data-parallel attention cannot record without an all-to-all back end.
        """
        return engine in self.engines and not (
            self.recording and (engine, layout) == ("sglang", "dp")
        )

    @property
    def file(self) -> str:
        """Return the name as part of a file's: of its log, its recording, its traces."""
        return self.name.replace(" ", "-")


CONTESTANTS = {
    c.name: c
    for c in (
        Contestant("stock"),
        Contestant("stock again"),
        Contestant("ideal", "linear", even=True),
        Contestant("linear", "linear"),
        Contestant("linear+recording", "linear", recording=True),
        Contestant("balanced", "balanced"),
        Contestant("zigzag", "zigzag"),
        Contestant("eplb", "eplb", load=True),
        Contestant("eplb+8", "eplb", 8, load=True),
        Contestant("eplb+16", "eplb", 16, load=True),
        Contestant("engine EPLB", None, 8, moving="sync"),
        Contestant("engine EPLB async", None, 8, moving="async", engines=("vllm",)),
        Contestant("our EPLB", "eplb", 8, load=True, moving="sync"),
        Contestant("our EPLB async", "eplb", 8, load=True, moving="async", engines=("vllm",)),
    )
}


def batches(
    contestants: Sequence[Contestant],
    at_once: int,
    takes: Callable[[Contestant], float] = lambda one: 0,
    free: float = 0,
) -> list[list[Contestant]]:
    """Group the contestants, each group with the first one and the ideal.

    So every ratio is of servers that took turns.

    Args:
        contestants: in their order.
        at_once: most servers of a group.
        takes: bytes of a GPU that one takes.
        free: bytes that a group may take.

    Raises:
        PlacementError: when there is no room beside those two for another.
    """
    always = [c for i, c in enumerate(contestants) if i == 0 or c.even]
    others = [c for c in contestants if c not in always]
    names = ", ".join(c.name for c in always)
    if others and at_once <= len(always):
        raise PlacementError(
            f"--at-once {at_once}: {names} are always up and at least one more: give "
            f"{len(always) + 1}"
        )
    made, left = [list(always)], free - sum(map(takes, always))
    for one in others:
        if len(made[-1]) > len(always) and (len(made[-1]) == at_once or takes(one) > left):
            made.append(list(always))
            left = free - sum(map(takes, always))
        if takes(one) > left:
            needed = sum(map(takes, always)) + takes(one)
            raise PlacementError(
                f"{names} are always up, and with {one.name} they take {needed / 1e9:.1f} GB of "
                f"each GPU, of which {free / 1e9:.1f} GB are free: "
                "use more --ranks, fewer --layers, or leave it out"
            )
        made[-1].append(one)
        left -= takes(one)
    return made


@dataclass(frozen=True)
class Setup:
    """Hold what all servers of a run share.

    Attributes:
        engine: ``vllm`` or ``sglang``.
        ranks: EP ranks.
        layout: ``tp`` (tensor-parallel attention) or ``dp`` (data-parallel attention).
        cpu: whether it runs without a GPU.
        dtype: of the weights.
        graphs: CUDA graphs.
        memory: share of a GPU's memory that must be free when a vLLM server starts; all servers are
            there at once.
        interval: forward passes between two rebalances.
        length: most tokens of a request, prompt and answer.
        cache: bytes of keys and values on each GPU.
        one_gpu: None where each rank has a GPU; ``shared``: all have one; ``lone``: only one is
            started. See ``benchmarks/one_gpu``.
        restless: whether our EPLB moves experts for any gain.
    """

    engine: str
    ranks: int
    layout: str
    cpu: bool
    dtype: str
    graphs: bool
    memory: float
    interval: int
    length: int
    cache: int
    one_gpu: str | None = None
    restless: bool = False

    @property
    def gpus(self) -> int:
        """Return the number of GPUs that are used."""
        return 1 if self.one_gpu else self.ranks

    @property
    def started(self) -> int:
        """Return the number of ranks that run."""
        return 1 if self.one_gpu == "lone" else self.ranks


def command(
    one: Contestant,
    setup: Setup,
    model: Path,
    load: Path | None,
    port: int,
    record: Path | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment of a contestant's server.

    Raises:
        PlacementError: when it needs a recorded load and there is none.
    """
    if one.load and load is None:
        raise PlacementError(
            f"{one.name} plans from a recorded load: give --load, or let the run record one"
        )
    arguments = _vllm(one, setup) if setup.engine == "vllm" else _sglang(one, setup)
    arguments += ["--stream-interval", str(STREAMED)]
    if one.moving and one.strategy:
        arguments += ["--expert-rebalance", json.dumps(RESTLESS if setup.restless else OURS)]
    settings = ServerSettings(setup.cpu, setup.dtype, setup.length, setup.ranks, tuple(arguments))
    placed = None
    if one.strategy is not None:
        # Where vLLM's EPLB moves experts, their number is in its own configuration below.
        redundant = 0 if setup.engine == "vllm" and one.moving else one.redundant
        placed = Placed(one.strategy, setup.ranks, load if one.load else None, redundant, record)
    line, env = SERVING_ENGINES[setup.engine].command(model, port, placed, settings)
    if setup.layout == "dp":
        line = _data_parallel(line, setup)
    # Servers that start side by side take memory of the two GPUs at different times, which SGLang
    # would take for a fault.
    own = (
        {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        if setup.engine == "vllm"
        else {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
    )
    if setup.one_gpu or setup.cpu and setup.layout == "dp":  # the CPU build, too, has gloo alone
        own |= one_gpu.environment(setup.one_gpu or "shared", setup.engine)
    if setup.one_gpu:
        line.append("--disable-custom-all-reduce")
    if setup.one_gpu == "lone" and one.strategy:
        # The other ranks' experts lie nowhere, which would be found out.
        line += ["--expert-placement-verify", "off"]
    return line, env | own | {"NCCL_NVLS_ENABLE": "0"}


def _vllm(one: Contestant, setup: Setup) -> list[str]:
    words = ["--no-enable-prefix-caching"]
    if one.strategy is None:
        words.append("--enable-expert-parallel")
    if not setup.cpu:
        # The cache's size is given: vLLM would else take other servers' memory for its own while it
        # measures.
        words += [
            "--gpu-memory-utilization",
            str(setup.memory),
            "--kv-cache-memory-bytes",
            str(setup.cache),
            "--max-num-batched-tokens",
            str(LARGEST_STEP),
            "--max-num-seqs",
            str(MOST_REQUESTS),
        ]
        if not setup.graphs:
            words.append("--enforce-eager")
    if one.moving:
        eplb = {
            "num_redundant_experts": one.redundant,
            "window_size": min(setup.interval, 1000),
            "step_interval": setup.interval,
            "use_async": one.moving == "async",
        }
        words += ["--enable-eplb", "--eplb-config", json.dumps(eplb)]
    return words


def _sglang(one: Contestant, setup: Setup) -> list[str]:
    # A server that waits for its turn would else take a core for each rank.
    words = ["--disable-radix-cache", "--sleep-on-idle"]
    if one.strategy is None:
        words += ["--ep-size", str(setup.ranks)]
        if one.redundant:
            words += ["--ep-num-redundant-experts", str(one.redundant)]
    if not setup.cpu:
        words += [
            "--attention-backend",
            "triton",
            "--sampling-backend",
            "pytorch",
            "--grammar-backend",
            "none",
        ]
        # SGLang takes a share of what was free before it loaded, less whatever others took since:
        # the share is large and the tokens are bounded.
        words += [
            "--mem-fraction-static",
            "0.95",
            "--max-total-tokens",
            str(CACHE_TOKENS),
            "--chunked-prefill-size",
            str(LARGEST_STEP),
        ]
        words += [
            "--max-running-requests",
            str(MOST_REQUESTS),
            "--cuda-graph-max-bs-decode",
            str(MOST_REQUESTS),
        ]
        words.append("--enforce-disable-flashinfer-allreduce-fusion")
        # Graphs of decoding only: steps of thousands of tokens gain nothing from one, and capturing
        # those takes a minute and a half.
        words.append("--disable-prefill-cuda-graph" if setup.graphs else "--disable-cuda-graph")
    if one.moving:
        words += [
            "--enable-eplb",
            "--eplb-rebalance-num-iterations",
            str(setup.interval),
            "--expert-distribution-recorder-mode",
            "stat",
        ]
    return words


def _data_parallel(line: list[str], setup: Setup) -> list[str]:
    """Return the command of the same server with data-parallel attention."""
    if setup.engine == "sglang":
        return [*line, "--dp-size", str(setup.ranks), "--enable-dp-attention"]
    at = line.index("--tensor-parallel-size")
    return [*line[:at], "--data-parallel-size", str(setup.ranks), *line[at + 2 :]]
