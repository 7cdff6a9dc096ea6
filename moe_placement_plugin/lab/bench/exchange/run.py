"""Run ``moe-placement bench exchange``: what moving experts between processes takes."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ....core.errors import PlacementError
from ....core.placement import Placement
from ....exchange.plan import ExchangePlan, plan_exchange
from ....planner import replan
from ....rebalancing.exchanger import STAGING_SHARE
from ....rebalancing.lost_experts import place_lost
from .drift import drift_suite
from .page_cache import cached_share, disk_rate, drop_cache

__all__ = ["SUITES", "dead_suite", "drift_suite"]

SUITES = ("dead", "drift")
RANKS = 8


class _Processes:
    """Starts eight processes, forked from a server that has torch loaded already."""

    def __init__(self):
        from torch.distributed import TCPStore

        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["moe_placement_plugin.lab.bench.exchange.ranks"])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._numbers = itertools.count()

    def run(
        self,
        folder: Path,
        sizes,
        moves: ExchangePlan,
        staging_bytes: int,
        cold: bool,
        read_peers: bool,
    ) -> tuple[list[dict], float]:
        """Return what the survivors measured, and how much of the checkpoint was in memory then.

        That is the greatest share that was in the page cache when a measurement began.

        Args:
            folder: of the checkpoint.
            sizes: of the model.
            moves: the exchange, whose dead ranks are killed.
            staging_bytes: bound on its staging memory.
            cold: whether the checkpoint is dropped from the page cache before each measurement.
            read_peers: whether ranks read experts in each other's memory.

        Raises:
            PlacementError: when one of them fails.
        """
        from .ranks import Job, measure  # lazy: heavy

        name = f"bench-{os.getpid()}-{next(self._numbers)}"
        job = Job(self._store.port, name, folder, sizes, moves, staging_bytes, read_peers)
        processes, pipes = [], []
        for rank in range(moves.new.num_ranks):
            here, there = self._context.Pipe()
            process = self._context.Process(target=measure, args=(rank, job, there), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        try:
            for pipe in pipes:
                pipe.recv()
            for rank in np.flatnonzero(~moves.live).tolist():
                os.kill(processes[rank].pid, signal.SIGKILL)
            for rank in np.flatnonzero(~moves.live).tolist():
                processes[rank].join()
            survivors = [pipes[rank] for rank in moves.live_ranks]
            for pipe in survivors:
                pipe.send("go")
            cached = 0.0
            for _ in range(3):  # the exchange and both ways to reload
                for pipe in survivors:
                    pipe.recv()
                if cold:
                    drop_cache(folder)
                    cached = max(cached, cached_share(folder) or 0.0)
                for pipe in survivors:
                    pipe.send("go")
            found = [pipe.recv() for pipe in survivors]
            for pipe in survivors:
                pipe.send("end")
            return found, cached
        except EOFError:
            raise PlacementError("a process of the bench ended early; its error is above") from None
        finally:
            for process in processes:
                process.kill()
                process.join()


def survivors_placements(
    old: Placement, load: np.ndarray, live: Sequence[int]
) -> dict[str, Placement]:
    """Return where experts go when only ``live`` ranks are left.

    ``recovered`` puts what was lost in place of spare replicas and moves nothing else;
    ``rebalanced`` goes on from there to what is as balanced as few moves make it.
    """
    kept = place_lost(old, live, load)
    slots = np.isin(old.rank_of_slot, list(live))
    sizes = [old.slots_per_rank[rank] for rank in live]
    table = kept.physical_to_logical.copy()
    table[:, slots] = replan(load, table[:, slots], sizes).physical_to_logical
    return {
        "recovered": kept,
        "rebalanced": Placement(table, old.num_logical_experts, old.slots_per_rank, old.layer_ids),
    }


def dead_suite(
    sizes,
    most_dead: int,
    replica_counts: Sequence[int],
    report: Callable[[str], None],
    repeats: int = 3,
    folder: Path | None = None,
    read_peers: bool = True,
) -> list[dict]:
    """Measure exchanges after the loss of ranks against a full reload (`ranks`).

    From the disk and from memory. The row without a loss moves nearly all slots: it shows the
    bandwidth. Staging memory is what engines get, half of a layer. What a live rank holds is read
    in its memory, as between the ranks of a host, or sent, as between hosts. All of it for each of
    ``replica_counts``, how often an expert is held.

    Raises:
        PlacementError: when torch is missing, or the weights after an exchange are not those of the
            checkpoint.
    """
    from .ranks import uniform_replicas, write_checkpoint  # lazy: heavy

    rows = []
    processes = _Processes()
    with tempfile.TemporaryDirectory(prefix="exchange-bench-", dir=folder) as name:
        checkpoint = Path(name)
        report("writing the checkpoint")
        write_checkpoint(checkpoint, sizes)
        disk = disk_rate(checkpoint)
        for replicas, dead in [
            (replica_counts[0], 0),
            *((r, d) for r in replica_counts for d in range(1, most_dead + 1)),
        ]:
            rng = np.random.default_rng([replicas, dead])
            old = uniform_replicas(sizes, RANKS, replicas, rng)
            load = (
                np.rint(1000 * rng.lognormal(0, 0.5, (sizes.layers, sizes.experts))).astype(
                    np.int64
                )
                + 1
            )
            live = sorted(rng.permutation(RANKS)[dead:].tolist())
            goals = (
                survivors_placements(old, load, live)
                if dead
                else {"all moved": uniform_replicas(sizes, RANKS, replicas, rng)}
            )
            for goal, new in goals.items():
                report(f"{replicas} replicas, {dead} dead, {goal}")
                moves = plan_exchange(old, new, live_ranks=live, expert_bytes=sizes.expert_bytes)
                staging = max(
                    int(STAGING_SHARE * max(old.slots_per_rank) * sizes.expert_bytes),
                    moves.min_staging_bytes,
                )
                row: dict = {"goal": goal, "replicas": replicas, "dead": dead, "disk": disk}
                for kind in ("cold", "cached"):
                    runs = [
                        processes.run(checkpoint, sizes, moves, staging, kind == "cold", read_peers)
                        for _ in range(repeats)
                    ]
                    row[kind] = _times([run for run, _ in runs]) | {
                        "cached": max(share for _, share in runs)
                    }
                    row |= _figures(moves, [run for run, _ in runs])
                rows.append(row)
    if read_peers and not all(row["sees"] for row in rows):
        raise PlacementError(
            "processes cannot read each other's memory here (kernel.yama.ptrace_scope, or a "
            "container's rules): give --sent"
        )
    return rows


def _times(runs: list[list[dict]]) -> dict:
    """Return seconds, medians over the runs, of the slowest rank of each."""
    if not all(r["equal"] for run in runs for r in run):
        raise PlacementError(
            "weights after the exchange differ from the checkpoint's: this is a bug of the "
            "exchange; report it"
        )
    exchange, every, own = (
        np.array([max(r["seconds"][key] for r in run) for run in runs])
        for key in ("exchange", "reload all", "reload own")
    )
    return {
        "exchange": float(np.median(exchange)),
        "reload all": float(np.median(every)),
        "reload own": float(np.median(own)),
        "shorter": float(np.median(every / exchange)),
        "shorter than own": float(np.median(own / exchange)),
    }


def _figures(moves: ExchangePlan, runs: list[list[dict]]) -> dict:
    raw, longest = (
        np.array([max(r[key] for r in run) for run in runs]) for key in ("raw", "longest")
    )
    return {
        "slots": int(sum(moves.new.slots_per_rank[r] for r in moves.live_ranks))
        * moves.new.num_layers,
        "from_peers": len(moves.transfers),
        "from_disk": len(moves.reads),
        "bytes_moved": moves.bytes_moved,
        "bytes_read": moves.bytes_read,
        "raw": float(np.median(raw)),
        "longest": float(np.median(longest)),
        "staging": max(r["staging"] for run in runs for r in run),
        "chunks": runs[0][0]["chunks"],
        "sees": all(r["sees"] for run in runs for r in run),
    }
