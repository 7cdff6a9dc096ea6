"""``moe-placement bench exchange``: moving experts between real processes, and how much there is to move."""

from __future__ import annotations

import itertools
import mmap
import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ....core.errors import PlacementError
from ....core.placement import Placement
from ....exchange.plan import ExchangePlan, plan_exchange
from ....planner import plan, replan
from ....rebalancing.exchanger import STAGING_SHARE
from ....rebalancing.lost_experts import place_lost
from ..planner import families
from ..planner.contestants import Contestant
from ..planner.run import balancedness

SUITES = ("dead", "drift")
RANKS = 8
R1_EXPERT_BYTES = 44_040_192
"""An expert of DeepSeek-R1 in FP8: 3 x 7168 x 2048."""

TOLERANCES = (0.01, 0.008, 0.006, 0.005, 0.004, 0.003, 0.002, 0.001)
"""`replan`'s, tried from the loosest until its plans are as balanced as the engine's."""


def cached_share(folder: Path) -> float | None:
    """Share of the checkpoint's pages that are in the page cache, from a sample of them; None where that cannot be asked."""
    page, seen, hits = bytearray(4096), 0, 0
    try:
        for file in sorted(folder.iterdir()):
            handle = os.open(file, os.O_RDONLY)
            try:
                for offset in range(0, os.fstat(handle).st_size, 1 << 20):
                    seen += 1
                    try:
                        hits += os.preadv(handle, [page], offset, os.RWF_NOWAIT) > 0
                    except BlockingIOError:
                        continue
            finally:
                os.close(handle)
    except (OSError, AttributeError):
        return None
    return hits / seen if seen else None


def drop_cache(folder: Path) -> None:
    """Ask the system to forget the checkpoint's pages, which must be on the disk and in no mapping."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def disk_rate(folder: Path) -> float | None:
    """Bytes per second of reading the files past the page cache, which stays as it is; None where that cannot be done."""
    block = mmap.mmap(-1, 1 << 22)  # aligned as O_DIRECT wants it
    amount, begin = 0, time.perf_counter()
    try:
        for file in sorted(folder.iterdir()):
            handle = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                while got := os.readv(handle, [block]):
                    amount += got
            finally:
                os.close(handle)
    except (OSError, AttributeError):
        return None
    return amount / (time.perf_counter() - begin)


class _Processes:
    """Eight processes forked from a server that has torch loaded already."""

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
        """What the survivors measured, and the greatest share of the checkpoint that was in the page cache when a measurement began.

        Args:
            cold: whether the checkpoint is dropped from the page cache before each measurement.
            read_peers: whether ranks read experts in each other's memory.

        Raises:
            PlacementError: when one of them fails.
        """
        from .ranks import measure  # lazy: heavy

        name = f"bench-{os.getpid()}-{next(self._numbers)}"
        processes, pipes = [], []
        for rank in range(moves.new.num_ranks):
            here, there = self._context.Pipe()
            arguments = (
                rank,
                self._store.port,
                name,
                there,
                folder,
                sizes,
                moves,
                staging_bytes,
                read_peers,
            )
            process = self._context.Process(target=measure, args=arguments, daemon=True)
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
    """Where experts go when only ``live`` ranks are left.

    ``recovered`` puts what was lost in place of spare replicas and moves nothing else; ``rebalanced`` goes on from there to what is as
    balanced as few moves make it.
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
    """Exchanges after the loss of 1 to ``most_dead`` of 8 ranks, against a full reload (`exchange_ranks`), from the disk and from memory.

    The row without a loss moves nearly all slots: it shows the bandwidth. Staging memory is what engines get, half of a layer. What a live
    rank holds is read in its memory, as between the ranks of a host, or sent, as between hosts. All of it for each of
    ``replica_counts``, how often an expert is held.

    Raises:
        PlacementError: when torch is missing, or the weights after an exchange are not those of the checkpoint.
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
            "processes cannot read each other's memory here (kernel.yama.ptrace_scope, or a container's rules): give --sent"
        )
    return rows


def _times(runs: list[list[dict]]) -> dict:
    """Seconds, medians over the runs, of the slowest rank of each."""
    if not all(r["equal"] for run in runs for r in run):
        raise PlacementError(
            "weights after the exchange differ from the checkpoint's: this is a bug of the exchange; report it"
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


def drifting(traces: dict[str, np.ndarray], windows: int = 20) -> dict[str, np.ndarray]:
    """Loads, int64 [windows + 1, layers, experts], by the way they drift.

    Random steps away from the first trace, and a walk from trace to trace through mixtures of two neighbours.
    """
    shares = [load / load.sum(axis=1, keepdims=True) for load in traces.values()]
    rng = np.random.default_rng(0)
    popularity, steps = shares[0], []
    for _ in range(windows + 1):
        steps.append(families.counts(popularity, rng))
        popularity = families.drift(popularity, rng)
    found = {f"{next(iter(traces))}, drifting": np.stack(steps)}
    if len(shares) > 1:
        walk = []
        for where in np.linspace(0, len(shares) - 1, windows + 1):
            left = min(int(where), len(shares) - 2)
            mixed = (left + 1 - where) * shares[left] + (where - left) * shares[left + 1]
            walk.append(families.counts(mixed / mixed.sum(axis=1, keepdims=True), rng))
        found[f"from trace to trace ({len(shares)})"] = np.stack(walk)
    return found


def received(old: np.ndarray, new: np.ndarray, ranks: int) -> int:
    """Experts that ranks did not hold before, over all layers; an expert that a rank holds twice counts once."""
    layers, slots = old.shape
    count = 0
    for before, after in zip(old.reshape(layers, ranks, -1), new.reshape(layers, ranks, -1)):
        count += sum(np.setdiff1d(b, a).size for a, b in zip(before, after))
    return count


def drift_suite(
    traces: dict[str, np.ndarray],
    vllm: Contestant | None,
    report: Callable[[str], None],
    ranks: int = 32,
    redundant: int = 32,
) -> list[dict]:
    """Bytes that 20 rebalances move: the engine's policy against `replan`, at its own setting and at the engine's balance."""
    rows = []
    for label, loads in drifting(traces).items():
        report(label)
        slots = loads.shape[2] + redundant
        row: dict = {
            "case": label,
            "slots": loads.shape[1] * slots,
            "expert_bytes": R1_EXPERT_BYTES,
        }
        goal = None
        if vllm is not None:
            tables = [vllm.ask(load, slots, ranks, repeats=1).table for load in loads]
            row["vLLM default"] = _chain(loads, tables, ranks)
            goal = row["vLLM default"]["balancedness"]
        first = plan(loads[0], [slots // ranks] * ranks).physical_to_logical
        row["replan"] = _chain(loads, _replanned(loads, first, slots, ranks, None), ranks)
        for tolerance in TOLERANCES if goal is not None else ():
            equal = _chain(loads, _replanned(loads, first, slots, ranks, tolerance), ranks)
            if equal["balancedness"] >= goal:
                row["replan, as balanced"] = equal | {"tolerance": tolerance}
                break
        rows.append(row)
    return rows


def _replanned(loads, first, slots: int, ranks: int, tolerance: float | None) -> list[np.ndarray]:
    tables = [first]
    planned = replan if tolerance is None else partial(replan, tolerance=tolerance)
    for load in loads[1:]:
        tables.append(planned(load, tables[-1], [slots // ranks] * ranks).physical_to_logical)
    return tables


def _chain(loads, tables: Sequence[np.ndarray], ranks: int) -> dict:
    moved = sum(received(a, b, ranks) for a, b in zip(tables, tables[1:]))
    planned = [balancedness(load, table, ranks) for load, table in zip(loads[1:], tables[1:])]
    following = [balancedness(load, table, ranks) for load, table in zip(loads[2:], tables[1:])]
    return {
        "moved": moved,
        "bytes": moved * R1_EXPERT_BYTES,
        "balancedness": float(np.mean(planned)),
        "next": float(np.mean(following)),
    }
