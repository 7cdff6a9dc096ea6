"""Compare SGLang's static dispatch table, made by its own Python loops, with ours.

    python -m moe_placement_plugin.lab.bench.recording.sglang_dispatch

Needs SGLang installed. Prints the machine, the versions, both times and how unevenly the ranks are
spread over the replicas of an expert (ranks served by the busiest replica / mean over its replicas;
1.0 is even).
"""

from __future__ import annotations

import argparse
import platform
import time
import types
from typing import Any
from unittest import mock

import numpy as np

from ....core.load import ExpertLoad
from ....core.placement import Placement
from ....core.topology import Topology
from ....engines.sglang.compat import takes_server_args
from ....engines.sglang.dispatch_table import dispatch_table
from ....strategies.base import PlacementRequest
from ....strategies.registry import get_strategy

LAYERS, EXPERTS = 58, 256
"""MoE layers and logical experts of DeepSeek-R1."""


def stock_table(
    slots_of: np.ndarray, num_ranks: int, num_slots: int, ranks_per_node: int | None
) -> np.ndarray:
    """Return SGLang's own table for all ranks: ``[ranks, layers, experts]``.

    Args:
        slots_of: ``[layers, experts, most replicas]``, slots of each expert, -1 as padding.
        num_ranks: EP ranks.
        num_slots: physical experts per layer.
        ranks_per_node: consecutive ranks that share a node; None when nodes do not count.
    """
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.eplb import expert_location

    # Captured while it is stock: in a server it may be hooked already.
    function: Any = expert_location.compute_logical_to_rank_dispatch_physical_map
    function = getattr(function, "__wrapped__", function)
    parallel = types.SimpleNamespace(
        ep_size=num_ranks, nnodes=num_ranks // (ranks_per_node or num_ranks)
    )
    call: dict[str, Any] = {
        "logical_to_all_physical_map": torch.from_numpy(np.ascontiguousarray(slots_of)),
        "ep_size": num_ranks,
        "num_physical_experts": num_slots,
        # The function makes the whole table and returns the row of one rank: take all rows.
        "ep_rank": slice(None),
    }
    if takes_server_args(function):
        call["server_args"] = parallel
    with (
        mock.patch.object(
            expert_location, "_prefer_same_node_experts", lambda *_: ranks_per_node is not None
        ),
        # Imported by the module, or by the function each time (0.5.17, 0.5.18).
        mock.patch.object(expert_location, "get_parallel", lambda: parallel, create=True),
        mock.patch.object(runtime_context, "get_parallel", lambda: parallel),
    ):
        return function(**call).numpy()


def replica_imbalance(table: np.ndarray, slots_of: np.ndarray) -> np.ndarray:
    """Return the ranks served by an expert's busiest replica / mean over its replicas.

    Shape: ``[replicated experts of all layers]``.

    Args:
        table: ``[ranks, layers, experts]``, the slot that each rank uses.
        slots_of: ``[layers, experts, most replicas]``, slots of each expert, -1 as padding.
    """
    served = (table[..., None] == slots_of[None]).sum(axis=0)
    replicas = (slots_of != -1).sum(axis=-1)
    return (served.max(axis=-1) * replicas / table.shape[0])[replicas > 1]


def skewed_placement(
    num_ranks: int, num_redundant: int, num_nodes: int, seed: int = 0
) -> Placement:
    """Return `eplb`'s placement of R1's layers for a zipf-skewed load."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, EXPERTS + 1) ** 0.8
    counts = np.stack([rng.permutation(popularity) for _ in range(LAYERS)]) * 1e6
    request = PlacementRequest(
        LAYERS,
        EXPERTS,
        Topology.even(num_ranks, num_nodes),
        num_redundant,
        load=ExpertLoad(counts.astype(np.int64)[None]),
    )
    return get_strategy("eplb").place(request)


def best_of(runs: int, function: Any, *args: Any) -> tuple[float, np.ndarray]:
    """Return the seconds of the fastest of ``runs`` calls, and the result."""
    seconds = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        result = function(*args)
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def main(argv: list[str] | None = None) -> None:
    """Print one line per cluster shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="calls per side; the fastest counts")
    runs = parser.parse_args(argv).runs
    import sglang
    import torch

    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy "
        f"{np.__version__}, ",
        end="",
    )
    print(
        f"torch {torch.__version__}, SGLang {sglang.__version__}; {LAYERS} layers x {EXPERTS} "
        f"experts; best of {runs}"
    )
    print(
        f"{'ranks':>5} {'slots':>5} {'nodes':>5} | {'SGLang ms':>9} {'here ms':>8} {'times':>6} | "
        "imbalance mean (worst): SGLang, here"
    )
    for ranks, redundant, nodes in ((32, 32, 4), (64, 64, 8), (64, 64, 1), (128, 128, 16)):
        placement = skewed_placement(ranks, redundant, nodes)
        slots_of = placement.logical_to_physical.astype(np.int64)
        arguments = (slots_of, ranks, placement.num_slots, ranks // nodes)
        before, stock = best_of(max(1, min(runs, 3)), stock_table, *arguments)
        # Both sides answer what a server asks: the row of one rank (SGLang makes the whole table
        # for it).
        after, _ = best_of(runs, dispatch_table, *arguments, [ranks // 2])
        ours = dispatch_table(*arguments)
        spread = [replica_imbalance(t, slots_of) for t in (stock, ours)]
        print(
            f"{ranks:5} {placement.num_slots:5} {nodes:5} | {before * 1e3:9.1f} {after * 1e3:8.2f} "
            f"{before / after:6.0f} | "
            + ", ".join(f"{s.mean():.3f} ({s.max():.2f})" for s in spread)
        )


if __name__ == "__main__":
    main()
