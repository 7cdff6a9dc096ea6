"""Make sure that all ranks are about to serve the same placement, or none serves.

Between joining the process group and loading weights each rank writes a `Statement` into the
group's store and reads all others. Rank 0's placement travels with its statement, so that hosts
without the file take it from there. Any difference is one message, the same on every rank, since
every rank compares the same statements.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from operator import methodcaller
from typing import Any

from ..core.errors import PlacementError, first_line
from .bounded_store import BoundedStore, StoreSilent
from .identity import number_hosts, ranges

WAIT = 60.0
"""Seconds in which every rank must have said what it will serve.

All have joined the process group by then.
"""

_GRACE = 5.0  # seconds for the store to answer, and for the others to read why all stop
_PREFIX = "moe-placement-agreement"

NOWHERE = (
    "the plugin is not installed there or switched off (VLLM_PLUGINS, SGLANG_PLUGINS), or the "
    "placement flags are missing"
)
"""Why a rank may be silent."""


@dataclass(frozen=True)
class Statement:
    """Say what one rank is about to serve.

    Attributes:
        rank: in the process group of all hosts.
        host, address: of its machine, for messages.
        key: `identity.host_key`.
        plugin, engine: versions.
        strategy: in force.
        digest: of the placement over all layers; "" for the engine's own; None where the rank waits
            for the head's.
        source: the file that the placement came from, "" for none.
        rules: other settings that must be equal, JSON-compatible.
        error: why this host cannot have what was asked for; None when it can.
    """

    rank: int
    host: str
    address: str
    key: str
    plugin: str
    engine: str
    strategy: str
    digest: str | None
    source: str = ""
    rules: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Hold what all ranks found.

    Attributes:
        statements: of every rank, in order.
        parcel: the head's placement (`packed.pack`), None for the engine's own.
        seconds: what it took on this rank once every rank had come.
        waited: seconds that this rank waited for the last one to come, which it would have done at
            the next collective.
    """

    statements: tuple[Statement, ...]
    parcel: dict[str, Any] | None
    seconds: float
    waited: float = 0.0

    @property
    def node_of_rank(self) -> tuple[int, ...]:
        """Give the node index of each rank, int ``[ranks]``."""
        return number_hosts([s.key for s in self.statements])

    def names(self) -> tuple[str, ...]:
        """Describe each host as ``"name (address), ranks 0-3"``, in the nodes' order."""
        return tuple(_label(group) for group in _by_host(self.statements))

    def __str__(self) -> str:
        late = (
            f" (the last rank came {self.waited * 1000:.0f} ms after this one)"
            if self.waited > 0.01
            else ""
        )
        names = self.names()
        took = f"{self.seconds * 1000:.1f} ms{late}"
        return f"{len(names)} hosts agree after {took}: {'; '.join(names)}"


def agree(
    store: Any,
    statement: Statement,
    ranks: int,
    parcel: Mapping[str, Any] | None,
    wait: float = WAIT,
    name_rank: Callable[[int], str] = "rank {}".format,
) -> Agreement:
    """State what this rank is about to serve, and hear the others.

    Args:
        store: shared by all ranks and by nobody else.
        statement: this rank's.
        ranks: how many there are.
        parcel: this rank's placement, packed; rank 0's travels.
        wait: seconds in which all must have spoken.
        name_rank: says where a rank that never spoke must lie.

    Raises:
        PlacementError: on every rank alike, when they differ, when one of them has an error or is
            not heard of.
    """
    from torch.distributed import PrefixStore

    began = time.perf_counter()
    bounded = BoundedStore(PrefixStore(_PREFIX, store), wait + _GRACE)
    keys = [f"statement/{rank}" for rank in range(ranks)]
    try:
        if statement.rank == 0:
            bounded.ask(lambda s: s.set("parcel", json.dumps(parcel)))
        bounded.ask(lambda s: s.set(keys[statement.rank], json.dumps(asdict(statement))))
        spoken = time.perf_counter()
        missing = _wait_for_all(bounded, keys, wait)
        waited = time.perf_counter() - spoken
        heard = [rank for rank in range(ranks) if rank not in missing]
        texts = bounded.ask(lambda s: _read(s, [keys[rank] for rank in heard]))
        statements = [Statement(**json.loads(text)) for text in texts]
        problem = _first_problem(bounded, differences(statements, missing, wait, name_rank))
        if problem is not None:
            with suppress(RuntimeError):  # rank 0 may have left: the reason is known here
                _stay_until_all_know(bounded, statement.rank, len(statements))
            raise PlacementError(problem)
        head = json.loads(bounded.ask(lambda s: s.get("parcel")))
    except (StoreSilent, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise PlacementError(
            "the hosts could not compare their placements: the store on the host of rank 0 does "
            f"not answer ({reason}); look for the reason there"
        ) from error
    return Agreement(
        statements=tuple(statements),
        parcel=head,
        seconds=time.perf_counter() - began - waited,
        waited=waited,
    )


def differences(
    statements: Sequence[Statement],
    missing: Sequence[int] = (),
    wait: float = WAIT,
    name_rank: Callable[[int], str] = "rank {}".format,
) -> str | None:
    """Write one message that says which host differs from the head in what; None if all agree.

    Args:
        statements: of the ranks that spoke.
        missing: ranks that did not.
        wait: seconds that they were waited for.
        name_rank: says where a rank must lie.
    """
    parts = []
    if missing:
        where = ", ".join(dict.fromkeys(name_rank(rank) for rank in missing))
        parts.append(
            f"no word within {wait:g} s from {where}: {NOWHERE}; install the plugin on every host "
            "and give all of them the same flags"
        )
    hosts = _by_host(statements)
    for group in hosts:
        failed = next((s for s in group if s.error is not None), None)
        if failed is not None:
            parts.append(f"{_label(group)} cannot have what was asked for: {failed.error}")
    head = min(statements, key=lambda s: s.rank)
    for group in hosts:
        for other in group:
            unequal = [text for text in _compare(other, head) if text]
            if unequal and other.error is None and head.error is None:
                parts.append(f"{_label(group)} has {'; '.join(unequal)}")
                break  # its other ranks say the same
    if not parts:
        return None
    return (
        "the hosts do not agree on the expert placement, so none of them starts (the head is "
        f"{_label(hosts[0])}). " + ". ".join(parts)
    )


def _compare(other: Statement, head: Statement) -> list[str]:
    """Describe what differs, in one text for each thing that must be equal; empty where it is."""
    return [
        _unequal("plugin version", other.plugin, head.plugin, "install one version everywhere"),
        _unequal("engine", other.engine, head.engine, "install one version everywhere"),
        _unequal(
            "strategy",
            other.strategy,
            head.strategy,
            "give all hosts the same --expert-placement-strategy",
        ),
        *(
            _unequal(
                name, other.rules.get(name), head.rules.get(name), "give all hosts the same flags"
            )
            for name in sorted({*other.rules, *head.rules})
        ),
        _unequal_placement(other, head),
    ]


def _unequal(what: str, here: Any, head: Any, mend: str) -> str:
    return "" if here == head else f"{what} {here}, the head has {head}: {mend}"


def _unequal_placement(other: Statement, head: Statement) -> str:
    if other.digest == head.digest or (other.digest is None and head.digest):
        return ""
    if other.digest is None:
        return "no placement file, and the head has none either: give the head the file"

    def describe(statement: Statement) -> str:
        digest = (
            f"placement {statement.digest[:12]}"
            if statement.digest
            else "the engine's own placement"
        )
        return digest + (f" from {statement.source}" if statement.source else "")

    mend = "give all hosts the same flags"
    if other.source:
        mend = (
            f"{other.source} is another file, perhaps an old copy: remove it there (the head's "
            "placement travels) or copy the head's over it"
        )
    return f"{describe(other)}, the head has {describe(head)}: {mend}"


def _by_host(statements: Sequence[Statement]) -> list[list[Statement]]:
    ordered = sorted(statements, key=lambda s: s.rank)
    groups: list[list[Statement]] = []
    for statement, number in zip(ordered, number_hosts([s.key for s in ordered])):
        if number == len(groups):
            groups.append([])
        groups[number].append(statement)
    return groups


def _label(group: Sequence[Statement]) -> str:
    first = group[0]
    where = f"{first.host} ({first.address})" if first.address else first.host
    return f"{where}, {'rank' if len(group) == 1 else 'ranks'} {ranges([s.rank for s in group])}"


def _wait_for_all(store: BoundedStore, keys: Sequence[str], wait: float) -> list[int]:
    """Wait for all statements; return the ranks that gave none, the same list on all ranks."""
    # By asking again and again: torch writes a stack trace into the log whenever a wait of its own
    # runs out.
    began = time.monotonic()
    while not store.ask(lambda s: s.check(list(keys))):
        waited = time.monotonic() - began
        if waited > wait or store.ask(lambda s: s.check(["missing"])):
            silent = [
                rank for rank, key in enumerate(keys) if not store.ask(methodcaller("check", [key]))
            ]
            first = methodcaller("compare_set", "missing", "", json.dumps(silent))
            ranks: list[int] = json.loads(store.ask(first))
            return ranks
        time.sleep(0.001 if waited < 0.1 else 0.05)
    return []


def _read(store: Any, keys: list[str]) -> list[bytes]:
    """Read all values, at once where the store can."""
    if store.has_extended_api():
        return list(store.multi_get(keys))
    return [store.get(key) for key in keys]


def _first_problem(store: BoundedStore, problem: str | None) -> str | None:
    """Return the message of the rank that found one first, so that all stop with the same.

    A rank that came after the others had given up may have found another problem.
    """
    if problem is None:
        return None
    return str(store.ask(lambda s: s.compare_set("problem", "", problem)).decode())


def _stay_until_all_know(store: BoundedStore, rank: int, ranks: int) -> None:
    """Keep rank 0's process, which holds the store, until the others have read why all stop."""
    store.ask(lambda s: s.add("told", 1))
    if rank != 0:
        return
    deadline = time.monotonic() + _GRACE
    while store.ask(lambda s: s.add("told", 0)) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)
