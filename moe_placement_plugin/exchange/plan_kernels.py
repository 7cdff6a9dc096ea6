"""Find, compiled, who sends what and in which order slots are copied, for `plan`.

Arrays that belong together travel as one tuple. Slots are local to their rank.

Counters begin as ``np.int64(0)``: numba compiles a kernel that is passed a literal once more.
"""

from typing import NamedTuple

import numpy as np

from ..planner.kernels.compiled import kernel
from .transfer_table import SCRATCH


class Tables(NamedTuple):
    """Hold two placements.

    Attributes:
        old: int32 [layers, old slots].
        new: int32 [layers, new slots].
        old_start, new_start: int64 [ranks + 1], first slot of each rank.
    """

    old: np.ndarray
    new: np.ndarray
    old_start: np.ndarray
    new_start: np.ndarray


class Work(NamedTuple):
    """Take what `route` finds.

    Attributes:
        transfers: int32 [layers * new slots, 6], as `transfer_table.Transfer`.
        reads: int32 [layers * new slots, 4], as `transfer_table.Read`.
        copies: int32 [2 * layers * new slots, 4], as `transfer_table.Copy`; in an order in which
            every slot is read before it is overwritten.
    """

    transfers: np.ndarray
    reads: np.ndarray
    copies: np.ndarray


class Holders(NamedTuple):
    """Hold the live ranks that have the experts of one layer before the exchange.

    Attributes:
        slot_of: int32 [ranks, experts], the first slot that holds the expert; -1 for none.
        first: int64 [experts + 1]; ``ranks[first[e] : first[e + 1]]`` hold expert e.
        ranks: int64 [old slots].
        cursor: int64 [experts], scratch.
    """

    slot_of: np.ndarray
    first: np.ndarray
    ranks: np.ndarray
    cursor: np.ndarray


class LocalCopies(NamedTuple):
    """Hold copies within one rank of one layer.

    Attributes:
        source: int64 [slots], the slot that a slot is copied from; -1 for none.
        readers: int64 [slots], how many slots are copied from a slot.
        ready: int64 [slots], scratch.
    """

    source: np.ndarray
    readers: np.ndarray
    ready: np.ndarray


@kernel
def _put(table, row, a, b, c, d):
    """Fill the first four columns of a row (numba cannot assign tuples of mixed integer types)."""
    table[row, 0] = a
    table[row, 1] = b
    table[row, 2] = c
    table[row, 3] = d


@kernel
def _find_holders(tables, live, layer, holders):
    """Fill `holders` for a layer."""
    slot_of, first, cursor = holders.slot_of, holders.first, holders.cursor
    old, start = tables.old, tables.old_start
    ranks, experts = slot_of.shape
    slot_of[:] = -1
    first[:] = 0
    for r in range(ranks):
        if live[r]:
            for s in range(start[r + 1] - 1, start[r] - 1, -1):
                e = old[layer, s]
                if slot_of[r, e] < 0:
                    first[e + 1] += 1
                slot_of[r, e] = s - start[r]
    for e in range(experts):
        first[e + 1] += first[e]
        cursor[e] = first[e]
    for r in range(ranks):
        if live[r]:
            for s in range(start[r], start[r + 1]):
                e = old[layer, s]
                if slot_of[r, e] == s - start[r]:
                    holders.ranks[cursor[e]] = r
                    cursor[e] += 1


# Called for each transfer, with many arrays, whose passing would take as long as the choice.
@kernel(inline="always")
def _choose_sender(e, r, holders, node_of, sends, sends_before):
    """Return who sends expert `e`, which some rank holds, to rank `r`.

    A holder on the receiver's node, if there is one, and among those one that sends least: in this
    layer, then in the layers before.
    """
    begin, end = holders.first[e], holders.first[e + 1]
    near = False
    for h in range(begin, end):
        near = near or node_of[holders.ranks[h]] == node_of[r]
    best = -1
    for h in range(begin, end):
        a = holders.ranks[h]
        if near and node_of[a] != node_of[r]:
            continue
        if (
            best < 0
            or sends[a] < sends[best]
            or (
                sends[a] == sends[best]
                and sends_before[a] + sends[a] < sends_before[best] + sends[best]
            )
        ):
            best = a
    return best


@kernel
def _even_out(transfers, first, n, holders, node_of, sends):
    """Give a layer's transfers, rows `first` to `n`, to holders as near that send two fewer."""
    changed = True
    while changed:
        changed = False
        for t in range(first, n):
            e, sender, r = transfers[t, 1], transfers[t, 2], transfers[t, 4]
            begin, end = holders.first[e], holders.first[e + 1]
            near = node_of[sender] == node_of[r]
            for h in range(begin, end):
                a = holders.ranks[h]
                if (node_of[a] == node_of[r]) == near and sends[a] + 1 < sends[sender]:
                    sends[sender] -= 1
                    sends[a] += 1
                    transfers[t, 2] = a
                    transfers[t, 3] = holders.slot_of[a, e]
                    sender = a
                    changed = True


@kernel
def _order_copies(copies, k, layer, r, slots, local, within):
    """Write the copies of a rank from row `k` on, each slot read before it is overwritten.

    Args:
        copies: `Work.copies`.
        layer, r: the layer, and the rank.
        slots: of the rank; local: how many of them are copied from another.
        within: `LocalCopies`, used up.

    Returns:
        The first row that is free.
    """
    source, readers, ready = within.source, within.readers, within.ready
    # Slots that nobody reads any more can be overwritten; what is left then are cycles, one scratch
    # row opens each.
    waiting = 0
    for j in range(slots):
        if source[j] >= 0 and readers[j] == 0:
            ready[waiting] = j
            waiting += 1
    while waiting > 0:
        waiting -= 1
        j = ready[waiting]
        s = source[j]
        _put(copies, k, layer, r, s, j)
        k += 1
        local -= 1
        source[j] = -1
        readers[s] -= 1
        if readers[s] == 0 and s < slots and source[s] >= 0:
            ready[waiting] = s
            waiting += 1
    j = np.int64(0)
    while local > 0:
        if source[j] < 0:
            j += 1
            continue
        _put(copies, k, layer, r, j, np.int64(SCRATCH))
        k += 1
        at = j
        while source[at] != j:
            s = source[at]
            _put(copies, k, layer, r, s, at)
            k += 1
            local -= 1
            source[at] = -1
            at = s
        _put(copies, k, layer, r, np.int64(SCRATCH), at)
        k += 1
        local -= 1
        source[at] = -1
    return k


@kernel
def route(tables, experts, live, node_of, work):
    """Find how every slot of the new placement is filled, and write it into `work`.

    Sources are holders on the receiver's own node where there are any, and among those a rank that
    sends least in the layer: no transfer could be given to another such holder that sends two or
    more fewer.

    Args:
        tables: `Tables`.
        experts: logical experts per layer.
        live: bool [ranks], which ranks take part.
        node_of: int64 [ranks].
        work: `Work`.

    Returns:
        How many rows of transfers, reads and copies are filled.
    """
    old, new, old_start, new_start = tables.old, tables.new, tables.old_start, tables.new_start
    transfers, reads, copies = work.transfers, work.reads, work.copies
    ranks = live.size
    holders = Holders(
        np.empty((ranks, experts), np.int32),
        np.empty(experts + 1, np.int64),
        np.empty(old.shape[1], np.int64),
        np.empty(experts, np.int64),
    )
    slot_of, holders_of = holders.slot_of, holders.first
    sends = np.empty(ranks, np.int64)
    sends_before = np.zeros(ranks, np.int64)
    most = 1
    for r in range(ranks):
        most = max(most, old_start[r + 1] - old_start[r], new_start[r + 1] - new_start[r])
    within = LocalCopies(
        np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    )
    n, m, k = np.int64(0), np.int64(0), np.int64(0)
    for layer in range(old.shape[0]):
        _find_holders(tables, live, layer, holders)
        sends[:] = 0
        first = n
        for r in range(ranks):
            if not live[r]:
                continue
            slots = new_start[r + 1] - new_start[r]
            within.source[:] = -1
            within.readers[:] = 0
            local = np.int64(0)
            for j in range(slots):
                e = np.int64(new[layer, new_start[r] + j])
                at = slot_of[r, e]
                if at >= 0:
                    if j < old_start[r + 1] - old_start[r] and old[layer, old_start[r] + j] == e:
                        continue
                    within.source[j] = at
                    within.readers[at] += 1
                    local += 1
                elif holders_of[e] == holders_of[e + 1]:
                    _put(reads, m, layer, e, r, j)
                    m += 1
                else:
                    best = _choose_sender(e, r, holders, node_of, sends, sends_before)
                    sends[best] += 1
                    _put(transfers, n, layer, e, best, np.int64(slot_of[best, e]))
                    transfers[n, 4] = r
                    transfers[n, 5] = j
                    n += 1
            if local:
                k = _order_copies(copies, k, layer, r, slots, local, within)
        _even_out(transfers, first, n, holders, node_of, sends)
        for r in range(ranks):
            sends_before[r] += sends[r]
    return n, m, k
